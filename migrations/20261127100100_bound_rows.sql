-- Rows that a tenant makes have a bound: live ones by its limits, dead ones by number and age, releases by what is kept.

-- Dead rows go: the tenant's own beyond a number as it makes new ones, all of them by age in housekeeping. Row level
-- security holds for DELETE as well. A release is still never changed.
GRANT DELETE ON api_token, service_account, invitation, robot, egress_target, release TO bulkhead_runtime;
GRANT DELETE ON api_token, service_account, invitation, robot, egress_target, release, grant_offer, grant_answer
    TO bulkhead_reconciler;

-- What the limits count. Zero stands for the platform.
CREATE INDEX api_token_live ON api_token (coalesce(tenant_id, 0), expires_at) WHERE revoked_at IS NULL;
CREATE INDEX grant_offer_by_day ON grant_offer (tenant_id, offered_at);

-- A release of 32 KB that is replaced 53 times a second has to be cleared away as fast.
ALTER TABLE release SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0,
    toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_cost_delay = 0);

-- What was decided while no plan could be made: 500 causes of a tenant are enough to say why.
CREATE OR REPLACE FUNCTION network_note(wanted bigint, who text, why text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
    INSERT INTO public.network_cause (tenant_id, actor, words) SELECT wanted, who, why
    WHERE (SELECT count(*) FROM (SELECT FROM public.network_cause c WHERE c.tenant_id = wanted LIMIT 500) n) < 500;
    INSERT INTO public.work (kind, object_id, tenant_id) VALUES ('network', wanted, wanted)
    ON CONFLICT (kind, object_id) DO UPDATE SET wake = public.work.wake + 1,
        due_at = least(public.work.due_at, now()), parked_at = NULL, attempt = 0;
$$;
CREATE POLICY of_functions ON network_cause FOR SELECT TO bulkhead_owner USING (true);
