INSERT INTO network_rollout (service_id, service, description, before, endpoints, window_hours, observe_seconds, canaries, stage, begun_by)
SELECT id, name, description, endpoints, '[{"network": "10.5.0.3", "protocol": "tcp", "port": 9092}]', 1, 30, '{}', 'window', 'root' FROM service;
UPDATE tenant_service t SET rollout_id = r.id, endpoints = r.endpoints, moved_at = now() FROM network_rollout r WHERE r.service_id = t.service_id
    AND t.tenant_id = (SELECT min(id) FROM tenant);
INSERT INTO network_rollout_use (rollout_id, tenant_id, app_id, app, network, protocol, port, packets)
SELECT r.id, t.id, 1, 'web', '10.5.0.2', 'tcp', 9092, 7 FROM network_rollout r, tenant t;
INSERT INTO network_rollout_check (rollout_id, stage, tenant_id, app_id, app, network, protocol, port, must_be, outcome, good)
SELECT r.id, 'canary', t.id, 1, 'web', '10.5.0.3', 'tcp', 9092, 'open', 'opened', true FROM network_rollout r, tenant t;
INSERT INTO work (kind, object_id) SELECT 'rollout', id FROM network_rollout;
