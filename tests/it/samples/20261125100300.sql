INSERT INTO audit (tenant_id, actor, action, object, result, request_id) SELECT id, 'root', 'access.denied', name, 'denied', 'r' FROM tenant;
