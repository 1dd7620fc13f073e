INSERT INTO repository (tenant_id, name) SELECT id, 'empty' FROM tenant;
