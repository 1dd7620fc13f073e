-- One request at a time writes to an upload: two at once would let the bytes of one reach the file that the other has
-- committed. A claim lasts for a minute and is renewed while its request goes on.

ALTER TABLE upload
    ADD COLUMN part       text,
    ADD COLUMN part_until timestamptz,
    ADD CONSTRAINT a_claim_ends CHECK ((part IS NULL) = (part_until IS NULL));

-- Uploads from before they were on record with their repository: the registry has purged them.
ALTER TABLE upload NO FORCE ROW LEVEL SECURITY;
DELETE FROM upload WHERE repository = '';
ALTER TABLE upload FORCE ROW LEVEL SECURITY;
