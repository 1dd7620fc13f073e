INSERT INTO repository (tenant_id, name) SELECT id, 'empty' FROM tenant;
INSERT INTO upload (tenant_id, id, repository) SELECT id, 'under-way', 'empty' FROM tenant;
