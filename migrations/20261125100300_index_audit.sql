-- What the platform's people look for across all tenants, and refusals, each by an index of its own.
CREATE INDEX audit_of_all_by_actor ON audit (actor, id);
CREATE INDEX audit_of_all_by_action ON audit (action, id);
CREATE INDEX audit_of_all_by_object ON audit (object, id);
CREATE INDEX audit_denied ON audit (id) WHERE result = 'denied';
CREATE INDEX audit_denied_by_tenant ON audit (tenant_id, id) WHERE result = 'denied';

-- Between which numbers all rows of a stretch of time lie. A row has the time at which its transaction began
-- and the number of the moment in which it was written: ten minutes either way, longer than any transaction
-- lives. Without it a look at last March would walk through everything since.
CREATE FUNCTION audit_numbers(since timestamptz, until timestamptz, OUT after bigint, OUT before bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public
SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    SELECT a.id INTO after FROM public.audit a WHERE a.at < since - interval '10 minutes'
    ORDER BY a.at DESC, a.id DESC LIMIT 1;
    SELECT a.id INTO before FROM public.audit a WHERE a.at >= until + interval '10 minutes'
    ORDER BY a.at, a.id LIMIT 1;
    after := coalesce(after, 0);
    before := coalesce(before, 9223372036854775807);
END $$;
REVOKE EXECUTE ON FUNCTION audit_numbers(timestamptz, timestamptz) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit_numbers(timestamptz, timestamptz) TO bulkhead_runtime;
