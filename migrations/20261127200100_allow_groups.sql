-- A release has the groups that its image gives the user: group 0, which owns nothing on the host, and supplementary ones.
ALTER TABLE release DROP CONSTRAINT release_inside_gid_check;
ALTER TABLE release ADD CONSTRAINT release_inside_gid_check CHECK (inside_gid BETWEEN 0 AND 65535);
ALTER TABLE release ADD COLUMN inside_groups int[] NOT NULL DEFAULT '{}'
    CHECK (cardinality(inside_groups) <= 64 AND 0 <= ALL (inside_groups) AND 65535 >= ALL (inside_groups));
