INSERT INTO service (name, endpoints) VALUES ('kafka', '[{"network": "10.5.0.2", "protocol": "tcp", "port": 9092}]');
INSERT INTO tenant_service (tenant_id, service_id, given_by) SELECT t.id, s.id, 'root' FROM tenant t, service s;
INSERT INTO grant_offer (tenant_id, app_id, app, to_tenant, offered_by)
SELECT a.tenant_id, a.id, a.name, o.name, 'root' FROM app a JOIN tenant o ON o.id <> a.tenant_id;
INSERT INTO grant_answer (tenant_id, from_tenant_id, offer_id, accepted_by)
SELECT t.id, o.tenant_id, o.id, 'root' FROM grant_offer o JOIN tenant t ON t.name = o.to_tenant;
INSERT INTO egress_target (tenant_id, name, network, protocol, ports, reason, asked_by)
SELECT id, 'payments', '192.88.99.0/24', 'tcp', '{443}', 'to be paid', 'root' FROM tenant;
INSERT INTO egress_target (tenant_id, name, domain, protocol, ports, reason, asked_by)
SELECT id, 'mail', 'mail.example.org', 'tcp', '{587}', 'receipts', 'root' FROM tenant;
INSERT INTO tenant_plan (tenant_id) SELECT id FROM tenant;
INSERT INTO network_plan (tenant_id, hash, opens, closes, causes, state)
SELECT id, 'x', '[]', '[]', '[]', 'in_force' FROM tenant ORDER BY id;
INSERT INTO network_cause (tenant_id, actor, words) SELECT id, 'root', 'x' FROM tenant;
INSERT INTO network_trial (tenant_id, until, begun_by) SELECT id, now() + interval '1 day', 'root' FROM tenant;
