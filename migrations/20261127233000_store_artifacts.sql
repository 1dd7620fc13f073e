-- Whatever OCI knows is stored, artifacts that are attached to a manifest too: these are listed by their subject, which
-- may be missing. Annotations are the text of a JSON object, at most 64 KiB of keys and values.
CREATE TABLE referrer (
    tenant_id     bigint NOT NULL,
    repository    text NOT NULL,
    subject       text NOT NULL CHECK (subject ~ '^sha256:[0-9a-f]{64}$'),
    digest        text NOT NULL,
    artifact_type text NOT NULL CHECK (char_length(artifact_type) <= 255),
    annotations   text NOT NULL,
    PRIMARY KEY (tenant_id, repository, subject, digest),
    FOREIGN KEY (tenant_id, repository, digest) REFERENCES manifest ON DELETE CASCADE
);
CREATE INDEX referrer_by_digest ON referrer (tenant_id, repository, digest);

GRANT SELECT, INSERT ON referrer TO bulkhead_runtime, bulkhead_reconciler;

ALTER TABLE referrer ENABLE ROW LEVEL SECURITY;
ALTER TABLE referrer FORCE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON referrer TO bulkhead_runtime
    USING (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint))
    WITH CHECK (tenant_id = (SELECT nullif(current_setting('app.tenant', true), '')::bigint));
CREATE POLICY of_reconciler ON referrer TO bulkhead_reconciler USING (true) WITH CHECK (true);

-- How far an upload is, and the registry's own state of it: the platform keeps both, so that a client that was cut off
-- asks how far it is and goes on. An upload from before has no state; its client begins anew.
ALTER TABLE upload
    ADD COLUMN state text CHECK (char_length(state) BETWEEN 1 AND 2048),
    ADD COLUMN received bigint NOT NULL DEFAULT 0 CHECK (received >= 0);
