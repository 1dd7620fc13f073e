-- What a layer becomes on the engine's disk, measured once for each layer of a tenant. Its bytes count against
-- `image_bytes` as long as the blob is there.
CREATE TABLE layer (
    tenant_id bigint NOT NULL,
    digest    text NOT NULL,
    bytes     bigint NOT NULL CHECK (bytes >= 0),
    report    jsonb NOT NULL,
    at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, digest),
    FOREIGN KEY (tenant_id, digest) REFERENCES blob (tenant_id, digest) ON DELETE CASCADE
);

GRANT SELECT, INSERT ON layer TO bulkhead_runtime, bulkhead_reconciler;

ALTER TABLE layer ENABLE ROW LEVEL SECURITY;
ALTER TABLE layer FORCE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON layer TO bulkhead_runtime
    USING (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint))
    WITH CHECK (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint));
CREATE POLICY of_reconciler ON layer TO bulkhead_reconciler USING (true) WITH CHECK (true);
