INSERT INTO layer (tenant_id, digest, bytes, report) SELECT tenant_id, digest, 4096, '{}' FROM blob ON CONFLICT DO NOTHING;
