-- Quotas as rows: tenant, resource, limit, used. A resource more is a row more, and no column.

-- Where an earlier migration of the same run has forced row level security, the owner would copy nothing.
ALTER TABLE quota NO FORCE ROW LEVEL SECURITY;
ALTER TABLE quota RENAME CONSTRAINT quota_pkey TO quota_before_pkey;
ALTER TABLE quota RENAME TO quota_before;

-- The resources that exist, and the limit that holds where a tenant has none of its own. `serve` writes its settings
-- here as it starts, so that requests, reconcilers and every replica go by the same numbers. A row is also the lock
-- for the resources of the platform itself.
CREATE TABLE quota_default (
    resource text PRIMARY KEY CHECK (resource ~ '^[a-z][a-z_]{1,39}$'),
    limit_   bigint NOT NULL CHECK (limit_ >= 0)
);
INSERT INTO quota_default (resource, limit_) VALUES
    ('cpu', 4000), ('memory', 8589934592), ('pids', 4096), ('apps', 20), ('instances', 60),
    ('registry_bytes', 21474836480), ('image_bytes', 85899345920),
    ('repositories', 200), ('tags', 10000), ('manifests', 20000), ('open_uploads', 64), ('registry_credentials', 100),
    ('service_accounts', 50), ('api_tokens', 200), ('invitations', 100), ('members', 200), ('grants', 200),
    ('egress_targets', 100), ('releases_kept', 100), ('requests_per_second', 200), ('request_burst', 600),
    ('platform_tokens', 200), ('platform_invitations', 200);

-- Locking a row is what makes a race for the last place impossible. `limit_` is null where the default holds. A limit
-- may be lowered below the use; then nothing new fits. `used` is kept for what is reserved or stored; things that are
-- counted have their own rows elsewhere.
CREATE TABLE quota (
    tenant_id bigint NOT NULL REFERENCES tenant (id),
    resource  text NOT NULL REFERENCES quota_default (resource),
    limit_    bigint CHECK (limit_ >= 0),
    used      bigint NOT NULL DEFAULT 0 CHECK (used >= 0),
    PRIMARY KEY (tenant_id, resource)
) WITH (fillfactor = 70);

INSERT INTO quota (tenant_id, resource, limit_, used)
SELECT b.tenant_id, d.resource,
       CASE d.resource
           WHEN 'cpu' THEN b.cpu_millis WHEN 'memory' THEN b.memory WHEN 'apps' THEN b.apps
           WHEN 'instances' THEN b.instances WHEN 'registry_bytes' THEN b.registry_bytes
           WHEN 'image_bytes' THEN least(b.registry_bytes, 1125899906842624) * 4 END,
       CASE d.resource
           WHEN 'cpu' THEN b.used_cpu_millis WHEN 'memory' THEN b.used_memory WHEN 'apps' THEN b.used_apps
           WHEN 'instances' THEN b.used_instances WHEN 'registry_bytes' THEN b.used_registry_bytes ELSE 0 END
FROM quota_before b CROSS JOIN quota_default d WHERE d.resource NOT LIKE 'platform%';

DROP TABLE quota_before;

GRANT SELECT ON quota, quota_default TO bulkhead_runtime, bulkhead_reconciler;
GRANT INSERT, UPDATE ON quota TO bulkhead_runtime, bulkhead_reconciler;
GRANT INSERT, UPDATE ON quota_default TO bulkhead_runtime;

ALTER TABLE quota ENABLE ROW LEVEL SECURITY;
ALTER TABLE quota FORCE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON quota TO bulkhead_runtime
    USING (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint))
    WITH CHECK (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint));
CREATE POLICY of_reconciler ON quota TO bulkhead_reconciler USING (true) WITH CHECK (true);
CREATE POLICY of_platform ON quota FOR SELECT TO bulkhead_runtime
    USING ((SELECT current_setting('app.platform', true)) = 'on');
