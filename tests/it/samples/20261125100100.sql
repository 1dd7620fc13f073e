INSERT INTO audit (tenant_id, actor, action, object, request_id) SELECT id, 'root', 'tenant.change', name, 'r' FROM tenant;
INSERT INTO audit_round (number, tx_to, last_id, mac) VALUES (1, '100', 1, decode(repeat('09', 32), 'hex'));
INSERT INTO audit_seal (round, tenant_id, number, ids, first_at, last_at, macs, mac)
SELECT 1, id, 1, '{1}', now(), now(), decode(repeat('0a', 16), 'hex'), decode(repeat('0b', 32), 'hex') FROM tenant;
