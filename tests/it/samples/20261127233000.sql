INSERT INTO referrer (tenant_id, repository, subject, digest, artifact_type, annotations)
SELECT tenant_id, repository, 'sha256:' || repeat('d', 64), digest, 'application/vnd.example', '{}' FROM manifest;
