INSERT INTO account (name, display_name, password, platform_role)
VALUES ('alice', 'Alice', '$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaA', 'admin'), ('bob', 'Bob', NULL, NULL);
INSERT INTO account_identity (issuer, subject, account_id) SELECT 'https://id.example', name, id FROM account;
INSERT INTO second_factor (account_id, sealed) SELECT id, '\x00' FROM account;
INSERT INTO recovery_code (account_id, hash) SELECT account_id, decode(repeat('05', 32), 'hex') FROM second_factor;
INSERT INTO membership (tenant_id, account_id, role, created_by) SELECT t.id, a.id, 'owner', 'root' FROM tenant t, account a;
INSERT INTO service_account (tenant_id, name, role, created_by) SELECT id, 'ci', 'deployer', 'root' FROM tenant;
INSERT INTO api_token (hash, name, tenant_id, role, service_account_id, created_by, expires_at)
SELECT sha256(s.id::text::bytea), 'ci', s.tenant_id, 'deployer', s.id, 'root', now() + interval '1 day' FROM service_account s;
INSERT INTO session (hash, account_id, method, place, agent)
SELECT sha256(id::text::bytea), id, 'password', '127.0.0.1', 'x' FROM account;
INSERT INTO sign_in (hash, kind, expires_at) VALUES (decode(repeat('06', 32), 'hex'), 'provider', now() + interval '1 hour');
INSERT INTO invitation (hash, kind, tenant_id, role, recipient, created_by, expires_at)
SELECT sha256(id::text::bytea), 'invitation', id, 'viewer', 'carol', 'root', now() + interval '1 day' FROM tenant;
INSERT INTO throttle (key, tat) VALUES (decode(repeat('07', 32), 'hex'), now());
INSERT INTO known_place (account_id, place) SELECT id, decode(repeat('08', 32), 'hex') FROM account;
