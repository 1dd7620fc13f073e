-- A change of a service that tenants use goes to them in stages: a window in which what it would close is
-- counted, some tenants first, then all; and back again if what must be open is not.

CREATE TABLE network_rollout (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    service_id      bigint NOT NULL,
    service         text NOT NULL,
    description     text NOT NULL,
    -- What holds for who is not reached yet, and what for who is.
    before          jsonb NOT NULL,
    endpoints       jsonb NOT NULL,
    window_hours    int NOT NULL CHECK (window_hours BETWEEN 0 AND 168),
    observe_seconds int NOT NULL CHECK (observe_seconds BETWEEN 0 AND 86400),
    -- Who is reached first; absent: some are chosen when it comes to it.
    canaries        bigint[],
    stage           text NOT NULL CHECK (stage IN ('window', 'canary', 'all', 'undo', 'over')),
    outcome         text CHECK (outcome IN ('done', 'aborted', 'rolled_back')),
    -- When the stage began, and when it ends at the earliest: the window, or the time of looking.
    stage_at        timestamptz NOT NULL DEFAULT now(),
    until           timestamptz,
    paused_by       text,
    paused_at       timestamptz,
    -- Somebody has let it go on in this stage as it is.
    resumed         boolean NOT NULL DEFAULT false,
    message         text NOT NULL DEFAULT '',
    begun_by        text NOT NULL,
    begun_at        timestamptz NOT NULL DEFAULT now(),
    ended_at        timestamptz,
    CHECK ((stage = 'over') = (ended_at IS NOT NULL)),
    CHECK (stage NOT IN ('undo', 'over') OR outcome IS NOT NULL)
);
CREATE UNIQUE INDEX rollout_is_under_way ON network_rollout (service_id) WHERE stage <> 'over';
CREATE INDEX network_rollout_over ON network_rollout (ended_at) WHERE stage = 'over';

-- What a roll-out means for a tenant: the endpoints that hold for it instead of the service's own, those that will
-- (what else it uses is counted until then), and when either was last changed.
ALTER TABLE tenant_service ADD COLUMN rollout_id bigint REFERENCES network_rollout (id);
ALTER TABLE tenant_service ADD COLUMN endpoints jsonb;
ALTER TABLE tenant_service ADD COLUMN coming jsonb;
ALTER TABLE tenant_service ADD COLUMN moved_at timestamptz;
CREATE INDEX tenant_service_by_rollout ON tenant_service (rollout_id, moved_at) WHERE rollout_id IS NOT NULL;

-- What was used, within the window, of what the change closes.
CREATE TABLE network_rollout_use (
    rollout_id bigint NOT NULL REFERENCES network_rollout (id) ON DELETE CASCADE,
    tenant_id  bigint NOT NULL REFERENCES tenant (id),
    app_id     bigint NOT NULL,
    app        text NOT NULL,
    network    text NOT NULL,
    protocol   text NOT NULL,
    port       int NOT NULL,
    packets    bigint NOT NULL,
    first_at   timestamptz NOT NULL DEFAULT now(),
    last_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (rollout_id, tenant_id, app_id, network, protocol, port)
);

-- What was tried from within tenants' apps: before, from the first ones, from the others.
CREATE TABLE network_rollout_check (
    rollout_id bigint NOT NULL REFERENCES network_rollout (id) ON DELETE CASCADE,
    stage      text NOT NULL CHECK (stage IN ('before', 'canary', 'all')),
    tenant_id  bigint NOT NULL REFERENCES tenant (id),
    app_id     bigint NOT NULL,
    app        text NOT NULL,
    network    text NOT NULL,
    protocol   text NOT NULL,
    port       int NOT NULL,
    must_be    text NOT NULL CHECK (must_be IN ('open', 'closed')),
    outcome    text NOT NULL,
    good       boolean NOT NULL,
    at         timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (rollout_id, stage, tenant_id, app_id, network, protocol, port)
);

-- What was tried once a plan was in force.
ALTER TABLE network_plan ADD COLUMN probed jsonb;
-- When it is to be tried, or tried again; nothing once it was.
ALTER TABLE network_plan ADD COLUMN probe_at timestamptz;
CREATE INDEX network_plan_to_probe ON network_plan (probe_at) WHERE probe_at IS NOT NULL;

-- Work that is no tenant's.
ALTER TABLE work ALTER COLUMN tenant_id DROP NOT NULL;
CREATE POLICY of_platform ON work TO bulkhead_runtime
    USING (tenant_id IS NULL AND (SELECT current_setting('app.platform', true)) = 'on')
    WITH CHECK (tenant_id IS NULL AND (SELECT current_setting('app.platform', true)) = 'on');

-- Whoever uses a service is woken as a roll-out reaches it.
DROP FUNCTION network_wake_users(bigint, text, text);

GRANT SELECT ON network_rollout, network_rollout_use, network_rollout_check TO bulkhead_runtime, bulkhead_reconciler;
GRANT INSERT, UPDATE ON network_rollout TO bulkhead_runtime;
GRANT UPDATE, DELETE ON network_rollout TO bulkhead_reconciler;
GRANT INSERT, UPDATE ON network_rollout_use, network_rollout_check TO bulkhead_reconciler;
GRANT UPDATE (rollout_id, endpoints, coming, moved_at) ON tenant_service TO bulkhead_reconciler;
GRANT UPDATE ON service TO bulkhead_reconciler;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO bulkhead_runtime, bulkhead_reconciler;

DO $$
DECLARE
    part text;
BEGIN
    FOREACH part IN ARRAY ARRAY['network_rollout_use', 'network_rollout_check'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', part);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', part);
        EXECUTE format(
            'CREATE POLICY of_tenant ON %I TO bulkhead_runtime '
            'USING (tenant_id = (SELECT nullif(current_setting(''app.tenant'', true), '''')::bigint)) '
            'WITH CHECK (tenant_id = (SELECT nullif(current_setting(''app.tenant'', true), '''')::bigint))', part);
        EXECUTE format('CREATE POLICY of_reconciler ON %I TO bulkhead_reconciler USING (true) WITH CHECK (true)', part);
        EXECUTE format(
            'CREATE POLICY of_platform ON %I FOR SELECT TO bulkhead_runtime '
            'USING ((SELECT current_setting(''app.platform'', true)) = ''on'')', part);
    END LOOP;
END $$;

-- A roll-out is the platform's alone: what of it is a tenant's stands in the tenant's own row.
ALTER TABLE network_rollout ENABLE ROW LEVEL SECURITY;
ALTER TABLE network_rollout FORCE ROW LEVEL SECURITY;
CREATE POLICY of_platform ON network_rollout TO bulkhead_runtime
    USING ((SELECT current_setting('app.platform', true)) = 'on')
    WITH CHECK ((SELECT current_setting('app.platform', true)) = 'on');
CREATE POLICY of_reconciler ON network_rollout TO bulkhead_reconciler USING (true) WITH CHECK (true);
