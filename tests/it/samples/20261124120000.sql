INSERT INTO installation (id, uid_start, uid_end, range_size, block_size, network_start, network_prefix, subnet_prefix)
VALUES ('demo', 1879048192, 1912602624, 65536, 1024, 171966464, 13, 22);
INSERT INTO tenant (name, display_name) VALUES ('acme', 'Acme'), ('beta', 'Beta');
INSERT INTO quota (tenant_id, cpu_millis, memory, apps, instances, registry_bytes)
SELECT id, 4000, 1 << 30, 10, 20, 1 << 30 FROM tenant;
INSERT INTO uid_range (tenant_id, pool_start, pool_end, size, block_size)
SELECT id, 1879048192, 1912602624, 65536, 1024 FROM tenant ORDER BY id;
INSERT INTO network (tenant_id, limit_) SELECT id, 512 FROM tenant ORDER BY id;
INSERT INTO tenant_condition (tenant_id, type, status, reason, message)
SELECT id, 'Network', 'true', 'Ready', 'there' FROM tenant;
INSERT INTO offboarding_step (tenant_id, position, name) SELECT id, 1, 'robots' FROM tenant;
INSERT INTO app (tenant_id, name, peak_instances, peak_surge, peak_cpu_millis, peak_memory, uid_slot, uid_start, uid_size)
SELECT u.tenant_id, 'web', 1, 1, 100, 67108864, u.slot, lower(u.r), 1024 FROM uid_range u;
INSERT INTO release (tenant_id, app_id, revision, spec, repository, tag, index_digest, digest, inside_uid, inside_gid, actor)
SELECT tenant_id, id, 1,
       '{"spec": "v1", "name": "web", "image": "web:1", "cpu": "100m", "memory": "64Mi", "instances": 1}',
       'web', '1', 'sha256:' || repeat('a', 64), 'sha256:' || repeat('b', 64), 1000, 1000, 'token:1' FROM app;
INSERT INTO app_address (tenant_id, host, app_id) SELECT tenant_id, 2, id FROM app;
INSERT INTO app_event (tenant_id, app_id, seq, at, kind, text) SELECT tenant_id, id, 1, now(), 'started', 'x' FROM app;
INSERT INTO machine_event (seq, at, kind, text) VALUES (1, now(), 'repaired', 'x');
INSERT INTO work (kind, object_id, tenant_id) SELECT 'app', id, tenant_id FROM app;
INSERT INTO idempotency (actor, key, request_hash, status, response) VALUES ('token:1', 'k', '\x00', 202, '{}');
INSERT INTO audit (tenant_id, actor, action, object, request_id) SELECT id, 'token:1', 'tenant.onboard', name, 'r' FROM tenant;
INSERT INTO api_token (hash, name, role, created_by, expires_at)
VALUES (decode(repeat('01', 32), 'hex'), 'first', 'admin', 'machine', now() + interval '1 day');
INSERT INTO session (hash, token_id) SELECT decode(repeat('02', 32), 'hex'), id FROM api_token;
INSERT INTO first_admin_link (hash, expires_at) VALUES (decode(repeat('03', 32), 'hex'), now() + interval '1 hour');
INSERT INTO refused_field (name) VALUES ('privileged');
