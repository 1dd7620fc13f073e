-- The registry's disk, counted in things as well as in bytes: an upload and a repository are on record from their
-- first request on, and a blob or a manifest counts at least 32 KiB, which is what its files and folders take.

ALTER TABLE upload
    ADD COLUMN repository text NOT NULL DEFAULT '',
    ADD COLUMN opened_at timestamptz NOT NULL DEFAULT now(),
    -- What the registry was asked to commit: written down before it is asked, so that a crash leaves a trace.
    ADD COLUMN digest text CHECK (digest ~ '^sha256:[0-9a-f]{64}$');
CREATE INDEX upload_by_digest ON upload (digest) WHERE digest IS NOT NULL;
CREATE INDEX upload_by_age ON upload (changed_at);
-- Whether any tenant holds a digest is asked before its bytes are collected.
CREATE INDEX blob_by_digest ON blob (digest);
CREATE INDEX manifest_by_digest ON manifest (digest);

-- Repositories that have a folder in the registry. A row goes after its folder.
CREATE TABLE repository (
    tenant_id bigint NOT NULL REFERENCES tenant (id),
    name      text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 128),
    used_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, name)
);

-- The owner of these tables may be one whom row level security binds: then it would count nothing.
ALTER TABLE quota NO FORCE ROW LEVEL SECURITY;
ALTER TABLE blob NO FORCE ROW LEVEL SECURITY;
ALTER TABLE blob_place NO FORCE ROW LEVEL SECURITY;
ALTER TABLE manifest NO FORCE ROW LEVEL SECURITY;

INSERT INTO repository (tenant_id, name)
SELECT tenant_id, repository FROM manifest UNION SELECT tenant_id, repository FROM blob_place;

UPDATE quota q SET used =
    coalesce((SELECT sum(greatest(b.size, 32768)) FROM blob b WHERE b.tenant_id = q.tenant_id), 0)
    + coalesce((SELECT sum(greatest(m.size, 32768)) FROM manifest m WHERE m.tenant_id = q.tenant_id), 0)
WHERE q.resource = 'registry_bytes';

ALTER TABLE quota FORCE ROW LEVEL SECURITY;
ALTER TABLE blob FORCE ROW LEVEL SECURITY;
ALTER TABLE blob_place FORCE ROW LEVEL SECURITY;
ALTER TABLE manifest FORCE ROW LEVEL SECURITY;

GRANT SELECT ON repository TO bulkhead_runtime, bulkhead_reconciler;
GRANT INSERT, UPDATE ON repository TO bulkhead_runtime, bulkhead_reconciler;
GRANT DELETE ON repository TO bulkhead_reconciler;
GRANT INSERT ON blob, blob_place TO bulkhead_reconciler;

ALTER TABLE repository ENABLE ROW LEVEL SECURITY;
ALTER TABLE repository FORCE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON repository TO bulkhead_runtime
    USING (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint))
    WITH CHECK (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint));
CREATE POLICY of_reconciler ON repository TO bulkhead_reconciler USING (true) WITH CHECK (true);
