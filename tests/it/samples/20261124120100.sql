INSERT INTO robot (tenant_id, name, push, hash, created_by, expires_at)
SELECT id, 'ci', true, decode(repeat('04', 32), 'hex'), 'token:1', now() + interval '1 day' FROM tenant;
INSERT INTO blob (tenant_id, digest, size) SELECT id, 'sha256:' || repeat('c', 64), 10 FROM tenant;
INSERT INTO blob_place (tenant_id, digest, repository) SELECT tenant_id, digest, 'web' FROM blob;
INSERT INTO manifest (tenant_id, repository, digest, media_type, size, total, confirmed, pushed_by)
SELECT id, 'web', 'sha256:' || repeat('b', 64), 'application/vnd.oci.image.manifest.v1+json', 5, 10, true, 'robot:1' FROM tenant;
INSERT INTO manifest_part (tenant_id, repository, digest, part, is_blob)
SELECT tenant_id, repository, digest, 'sha256:' || repeat('c', 64), true FROM manifest;
INSERT INTO tag (tenant_id, repository, name, digest, pushed_by) SELECT tenant_id, repository, '1', digest, 'robot:1' FROM manifest;
INSERT INTO upload (tenant_id, id, bytes) SELECT id, 'u', 3 FROM tenant;
