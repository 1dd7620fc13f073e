-- Who may talk to whom, beyond a tenant's own apps: the catalogue of platform services, grants between
-- tenants, the outside; and the plans that follow from them.

-- The catalogue. An endpoint is {"network": "10.5.0.2", "protocol": "tcp", "port": 9092}.
CREATE TABLE service (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text NOT NULL CONSTRAINT service_name_is_taken UNIQUE
                CHECK (name ~ '^[a-z]([a-z0-9-]{0,43}[a-z0-9])?$'),
    description text NOT NULL DEFAULT '' CHECK (char_length(description) <= 500),
    endpoints   jsonb NOT NULL CHECK (jsonb_typeof(endpoints) = 'array' AND jsonb_array_length(endpoints) BETWEEN 1 AND 32),
    generation  bigint NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now(),
    changed_at  timestamptz NOT NULL DEFAULT now()
);

-- Which tenant may use which service.
CREATE TABLE tenant_service (
    tenant_id  bigint NOT NULL REFERENCES tenant (id),
    service_id bigint NOT NULL CONSTRAINT service_is_in_use REFERENCES service (id),
    given_by   text NOT NULL,
    given_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, service_id)
);
CREATE INDEX tenant_service_by_service ON tenant_service (service_id, tenant_id);

-- A grant has two rows, one on each side, and each side writes its own alone: what one side has not written
-- is not agreed. The offer names the other side by its name, whether there is such a tenant or not: nobody can
-- find out by offering.
CREATE TABLE grant_offer (
    tenant_id    bigint NOT NULL REFERENCES tenant (id),
    id           bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    app_id       bigint NOT NULL,
    app          text NOT NULL,
    to_tenant    text NOT NULL CHECK (to_tenant ~ '^[a-z][a-z0-9-]{1,30}[a-z0-9]$'),
    to_app       text CHECK (to_app ~ '^[a-z]([a-z0-9-]{0,43}[a-z0-9])?$'),
    offered_by   text NOT NULL,
    offered_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    withdrawn_by text,
    withdrawn_at timestamptz,
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, app_id) REFERENCES app (tenant_id, id)
);
CREATE UNIQUE INDEX grant_is_offered_already ON grant_offer (tenant_id, app_id, to_tenant, coalesce(to_app, ''))
    WHERE withdrawn_at IS NULL;
CREATE INDEX grant_offer_by_receiver ON grant_offer (to_tenant, id) WHERE withdrawn_at IS NULL;

CREATE TABLE grant_answer (
    tenant_id      bigint NOT NULL REFERENCES tenant (id),
    from_tenant_id bigint NOT NULL,
    offer_id       bigint NOT NULL,
    accepted_by    text NOT NULL,
    accepted_at    timestamptz NOT NULL DEFAULT now(),
    ended_by       text,
    ended_at       timestamptz,
    PRIMARY KEY (tenant_id, offer_id),
    CONSTRAINT grant_answer_is_to_an_offer FOREIGN KEY (from_tenant_id, offer_id) REFERENCES grant_offer (tenant_id, id)
);
CREATE INDEX grant_answer_by_offer ON grant_answer (from_tenant_id, offer_id);

-- The outside: asked for by the tenant, decided by the platform.
CREATE TABLE egress_target (
    tenant_id   bigint NOT NULL REFERENCES tenant (id),
    id          bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name        text NOT NULL CHECK (name ~ '^[a-z]([a-z0-9-]{0,43}[a-z0-9])?$'),
    network     cidr CHECK (family(network) = 4),
    domain      text CHECK (char_length(domain) <= 253 AND domain ~ '^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    protocol    text NOT NULL CHECK (protocol IN ('tcp', 'udp')),
    ports       int[] NOT NULL CHECK (cardinality(ports) BETWEEN 1 AND 16 AND 1 <= ALL (ports) AND 65535 >= ALL (ports)),
    reason      text NOT NULL CHECK (char_length(reason) BETWEEN 1 AND 500),
    state       text NOT NULL DEFAULT 'asked' CHECK (state IN ('asked', 'approved', 'refused', 'withdrawn')),
    asked_by    text NOT NULL,
    asked_at    timestamptz NOT NULL DEFAULT now(),
    decided_by  text,
    decided_at  timestamptz,
    note        text CHECK (char_length(note) <= 500),
    expires_at  timestamptz,
    ended_by    text,
    ended_at    timestamptz,
    PRIMARY KEY (tenant_id, id),
    CHECK (num_nonnulls(network, domain) = 1)
);
CREATE UNIQUE INDEX egress_name_is_taken ON egress_target (tenant_id, name) WHERE state IN ('asked', 'approved');
CREATE INDEX egress_target_waiting ON egress_target (id) WHERE state = 'asked';
CREATE INDEX egress_target_by_name ON egress_target (tenant_id, name);

-- A trial: until then what a tenant's apps send outside is let through and written down, so that it is seen what
-- they need before it is closed.
CREATE TABLE network_trial (
    tenant_id bigint PRIMARY KEY REFERENCES tenant (id),
    until     timestamptz NOT NULL,
    begun_by  text NOT NULL,
    begun_at  timestamptz NOT NULL DEFAULT now()
);

-- What a tenant's apps may begin to talk to, as it stands: the plan that is, or is about to be, in force.
CREATE TABLE tenant_plan (
    tenant_id  bigint PRIMARY KEY REFERENCES tenant (id),
    number     bigint NOT NULL DEFAULT 0,
    hash       text NOT NULL DEFAULT '',
    flows      jsonb NOT NULL DEFAULT '[]',
    trial_until bigint,
    in_force   boolean NOT NULL DEFAULT true,
    changed_at timestamptz NOT NULL DEFAULT now()
);

-- Every plan that there was: what it opens and closes against the one before, and why.
CREATE SEQUENCE network_plan_number;
CREATE TABLE network_plan (
    tenant_id   bigint NOT NULL REFERENCES tenant (id),
    number      bigint NOT NULL DEFAULT nextval('network_plan_number') UNIQUE,
    hash        text NOT NULL,
    opens       jsonb NOT NULL,
    closes      jsonb NOT NULL,
    causes      jsonb NOT NULL,
    state       text NOT NULL CHECK (state IN ('proven', 'refused', 'in_force', 'superseded')),
    message     text NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now(),
    in_force_at timestamptz,
    PRIMARY KEY (tenant_id, number)
);

CREATE INDEX network_plan_by_age ON network_plan (created_at) WHERE state IN ('superseded', 'refused');

-- What was decided and has not become part of a plan yet.
CREATE TABLE network_cause (
    tenant_id bigint NOT NULL REFERENCES tenant (id),
    id        bigint GENERATED ALWAYS AS IDENTITY,
    actor     text NOT NULL,
    words     text NOT NULL,
    at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);

GRANT SELECT ON network_trial, service, tenant_service, grant_offer, grant_answer, egress_target, tenant_plan, network_plan,
    network_cause TO bulkhead_runtime, bulkhead_reconciler;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO bulkhead_runtime, bulkhead_reconciler;
GRANT INSERT, UPDATE, DELETE ON service TO bulkhead_runtime;
GRANT INSERT, DELETE ON tenant_service TO bulkhead_runtime;
GRANT INSERT, UPDATE, DELETE ON network_trial TO bulkhead_runtime;
GRANT INSERT ON grant_offer, grant_answer, egress_target, network_cause TO bulkhead_runtime;
GRANT UPDATE (withdrawn_by, withdrawn_at) ON grant_offer TO bulkhead_runtime;
GRANT UPDATE (accepted_by, accepted_at, ended_by, ended_at) ON grant_answer TO bulkhead_runtime;
GRANT UPDATE (state, decided_by, decided_at, note, expires_at, ended_by, ended_at) ON egress_target TO bulkhead_runtime;
GRANT INSERT, UPDATE ON tenant_plan, network_plan TO bulkhead_reconciler;
GRANT UPDATE ON SEQUENCE network_plan_number TO bulkhead_reconciler;
GRANT DELETE ON network_cause, network_plan, tenant_service, network_trial TO bulkhead_reconciler;
GRANT UPDATE ON grant_offer, grant_answer, egress_target TO bulkhead_reconciler;
GRANT INSERT ON network_cause TO bulkhead_reconciler;

DO $$
DECLARE
    part text;
BEGIN
    FOREACH part IN ARRAY ARRAY[
        'tenant_service', 'grant_offer', 'grant_answer', 'egress_target', 'tenant_plan', 'network_plan', 'network_cause',
        'network_trial'
    ] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', part);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', part);
        EXECUTE format(
            'CREATE POLICY of_tenant ON %I TO bulkhead_runtime '
            'USING (tenant_id = (SELECT nullif(current_setting(''app.tenant'', true), '''')::bigint)) '
            'WITH CHECK (tenant_id = (SELECT nullif(current_setting(''app.tenant'', true), '''')::bigint))', part);
        EXECUTE format('CREATE POLICY of_reconciler ON %I TO bulkhead_reconciler USING (true) WITH CHECK (true)', part);
    END LOOP;
    FOREACH part IN ARRAY ARRAY['tenant_service', 'egress_target', 'network_plan'] LOOP
        EXECUTE format(
            'CREATE POLICY of_platform ON %I FOR SELECT TO bulkhead_runtime '
            'USING ((SELECT current_setting(''app.platform'', true)) = ''on'')', part);
    END LOOP;
    FOREACH part IN ARRAY ARRAY['tenant_service', 'grant_offer', 'grant_answer'] LOOP
        EXECUTE format('CREATE POLICY of_functions ON %I FOR SELECT TO bulkhead_owner USING (true)', part);
    END LOOP;
    FOREACH part IN ARRAY ARRAY['work', 'network_cause'] LOOP
        EXECUTE format('CREATE POLICY of_functions_insert ON %I FOR INSERT TO bulkhead_owner WITH CHECK (true)', part);
    END LOOP;
    CREATE POLICY of_functions_update ON grant_offer FOR UPDATE TO bulkhead_owner USING (true) WITH CHECK (true);
    CREATE POLICY of_functions ON work FOR SELECT TO bulkhead_owner USING (true);
    CREATE POLICY of_functions_update ON work FOR UPDATE TO bulkhead_owner USING (true) WITH CHECK (true);
END $$;

-- The catalogue is the platform's; a tenant sees of it what it may use.
ALTER TABLE service ENABLE ROW LEVEL SECURITY;
ALTER TABLE service FORCE ROW LEVEL SECURITY;
CREATE POLICY of_platform ON service TO bulkhead_runtime
    USING ((SELECT current_setting('app.platform', true)) = 'on')
    WITH CHECK ((SELECT current_setting('app.platform', true)) = 'on');
CREATE POLICY of_tenant ON service FOR SELECT TO bulkhead_runtime
    USING (EXISTS (SELECT FROM tenant_service t WHERE t.service_id = service.id));
CREATE POLICY of_reconciler ON service TO bulkhead_reconciler USING (true) WITH CHECK (true);

-- There is something to do for a tenant's network, and why.
CREATE FUNCTION network_note(wanted bigint, who text, why text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
    INSERT INTO public.network_cause (tenant_id, actor, words) VALUES (wanted, who, why);
    INSERT INTO public.work (kind, object_id, tenant_id) VALUES ('network', wanted, wanted)
    ON CONFLICT (kind, object_id) DO UPDATE SET wake = public.work.wake + 1,
        due_at = least(public.work.due_at, now()), parked_at = NULL, attempt = 0;
$$;

-- The other side of a grant, for whom the transaction is about: what is offered to it, or what was answered to it.
CREATE FUNCTION network_offers_to()
RETURNS TABLE (id bigint, from_tenant_id bigint, from_tenant text, app text, to_app text, offered_at timestamptz,
               expires_at timestamptz, accepted_by text, accepted_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT o.id, o.tenant_id, g.name, o.app, o.to_app, o.offered_at, o.expires_at, a.accepted_by, a.accepted_at
    FROM public.tenant t JOIN public.grant_offer o ON o.to_tenant = t.name AND o.withdrawn_at IS NULL
    JOIN public.tenant g ON g.id = o.tenant_id
    LEFT JOIN public.grant_answer a ON a.tenant_id = t.id AND a.offer_id = o.id
    WHERE t.id = nullif(current_setting('app.tenant', true), '')::bigint AND o.offered_at >= t.created_at
      AND (o.expires_at IS NULL OR o.expires_at > now()) AND a.ended_at IS NULL;
END $$;

-- Whether an offer to whom the transaction is about is open; it stays as it is until the transaction ends.
CREATE FUNCTION network_lock_offer(wanted bigint) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
BEGIN
    PERFORM 1 FROM public.grant_offer o JOIN public.tenant t ON t.name = o.to_tenant
    WHERE o.id = wanted AND o.withdrawn_at IS NULL
      AND t.id = nullif(current_setting('app.tenant', true), '')::bigint FOR SHARE OF o;
    RETURN FOUND;
END $$;

CREATE FUNCTION network_answers()
RETURNS TABLE (offer_id bigint, accepted_at timestamptz, ended_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT a.offer_id, a.accepted_at, a.ended_at FROM public.grant_answer a
    WHERE a.from_tenant_id = nullif(current_setting('app.tenant', true), '')::bigint;
END $$;

-- Wakes whoever has accepted an app of the tenant that the transaction is about; one offer, or all of the app's.
CREATE FUNCTION network_wake_receivers(wanted_app bigint, wanted_offer bigint, why text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    row record;
    woken bigint := 0;
BEGIN
    FOR row IN
        SELECT DISTINCT a.tenant_id, t.name FROM public.grant_offer o
        JOIN public.grant_answer a ON a.from_tenant_id = o.tenant_id AND a.offer_id = o.id AND a.ended_at IS NULL
        JOIN public.tenant t ON t.id = o.tenant_id
        WHERE o.tenant_id = nullif(current_setting('app.tenant', true), '')::bigint
          AND ((o.app_id = wanted_app AND o.withdrawn_at IS NULL AND (o.expires_at IS NULL OR o.expires_at > now()))
               OR o.id = wanted_offer)
        ORDER BY a.tenant_id
    LOOP
        PERFORM public.network_note(row.tenant_id, 'tenant ' || row.name, why);
        woken := woken + 1;
    END LOOP;
    RETURN woken;
END $$;

-- Wakes whoever may use a service: for the platform alone.
CREATE FUNCTION network_wake_users(wanted_service bigint, who text, why text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    row record;
    woken bigint := 0;
BEGIN
    IF coalesce(current_setting('app.platform', true), '') <> 'on' THEN
        RAISE EXCEPTION 'this is for the platform alone';
    END IF;
    FOR row IN SELECT tenant_id FROM public.tenant_service WHERE service_id = wanted_service ORDER BY tenant_id LOOP
        PERFORM public.network_note(row.tenant_id, who, why);
        woken := woken + 1;
    END LOOP;
    RETURN woken;
END $$;

REVOKE EXECUTE ON FUNCTION network_note(bigint, text, text), network_offers_to(), network_answers(),
    network_lock_offer(bigint), network_wake_receivers(bigint, bigint, text), network_wake_users(bigint, text, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION network_offers_to(), network_answers(), network_lock_offer(bigint), network_wake_receivers(bigint, bigint, text),
    network_wake_users(bigint, text, text) TO bulkhead_runtime;
