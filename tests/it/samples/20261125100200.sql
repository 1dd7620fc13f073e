INSERT INTO audit (tenant_id, actor, action, object, request_id) SELECT id, 'root', 'tenant.change', name, 'r' FROM tenant;
