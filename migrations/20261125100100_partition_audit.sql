-- The audit by month, with what each row needs to be sealed: the transaction that wrote it.

CREATE SEQUENCE audit_number;
SELECT setval('audit_number', greatest(1, (SELECT coalesce(max(id), 0) FROM audit) + 1), false);
ALTER TABLE audit RENAME TO audit_before;
ALTER TABLE audit_before RENAME CONSTRAINT audit_pkey TO audit_before_pkey;
ALTER INDEX audit_by_tenant RENAME TO audit_before_by_tenant;

CREATE TABLE audit (
    id         bigint NOT NULL DEFAULT nextval('audit_number'),
    at         timestamptz NOT NULL DEFAULT now(),
    tx         xid8 NOT NULL DEFAULT pg_current_xact_id(),
    tenant_id  bigint REFERENCES tenant (id),
    actor      text NOT NULL,
    -- The token by which the actor came.
    via        text,
    action     text NOT NULL,
    object     text NOT NULL,
    result     text NOT NULL DEFAULT 'done' CHECK (result IN ('done', 'denied')),
    request_id text NOT NULL,
    detail     jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (at, id)
) PARTITION BY RANGE (at);
CREATE INDEX audit_by_number ON audit (id);
CREATE INDEX audit_by_tenant ON audit (tenant_id, id);
CREATE INDEX audit_by_actor ON audit (tenant_id, actor, id);
CREATE INDEX audit_by_action ON audit (tenant_id, action, id);
CREATE INDEX audit_by_object ON audit (tenant_id, object, id);
CREATE INDEX audit_by_transaction ON audit (tx);

-- A month is reached through the audit alone; its owner counts it when it is given up.
CREATE FUNCTION audit_close_part(part text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY', part);
    EXECUTE format('ALTER TABLE public.%I FORCE ROW LEVEL SECURITY', part);
    EXECUTE format('CREATE POLICY of_owner ON public.%I TO bulkhead_owner USING (true) WITH CHECK (true)', part);
END $$;

-- Rows of which no month was made yet: nothing is ever refused for want of a partition.
CREATE TABLE audit_rest PARTITION OF audit DEFAULT;
SELECT audit_close_part('audit_rest');

-- Makes the partitions of this month and the next two. Run by the service, which owns no table.
CREATE FUNCTION audit_prepare_months() RETURNS int LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, public AS $$
DECLARE
    first date;
    part text;
    made int := 0;
BEGIN
    FOR n IN 0..2 LOOP
        first := (date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => n))::date;
        part := 'audit_' || to_char(first, 'YYYYMM');
        IF to_regclass('public.' || part) IS NULL THEN
            BEGIN
                EXECUTE format('CREATE TABLE public.%I PARTITION OF public.audit FOR VALUES FROM (%L) TO (%L)',
                               part, to_char(first, 'YYYY-MM-DD') || ' 00:00:00+00',
                               to_char(first + interval '1 month', 'YYYY-MM-DD') || ' 00:00:00+00');
                PERFORM public.audit_close_part(part);
                made := made + 1;
            EXCEPTION WHEN check_violation THEN
                -- Rows of this month are among the rest already: they stay there.
                NULL;
            END;
        END IF;
    END LOOP;
    RETURN made;
END $$;
SELECT audit_prepare_months();

INSERT INTO audit (id, at, tenant_id, actor, action, object, request_id, detail)
SELECT id, at, tenant_id, actor, action, object, request_id, detail FROM audit_before;
DROP TABLE audit_before;

-- A round of the sealer: every row of the transactions since the last one up to, and without, tx_to. Its MAC
-- covers the round before and the seals in it; the last one is exported, so that a cut tail is seen.
CREATE TABLE audit_round (
    number   bigint PRIMARY KEY CHECK (number >= 1),
    at       timestamptz NOT NULL DEFAULT now(),
    tx_to    xid8 NOT NULL,
    last_id  bigint NOT NULL,
    mac      bytea NOT NULL CHECK (octet_length(mac) = 32)
);

-- The rows of one tenant (or of the platform itself: no tenant) and one month in one round, chained to the
-- seal before.
CREATE TABLE audit_seal (
    round     bigint NOT NULL REFERENCES audit_round (number),
    tenant_id bigint REFERENCES tenant (id),
    number    bigint NOT NULL CHECK (number >= 1),
    ids       bigint[] NOT NULL,
    first_at  timestamptz NOT NULL,
    last_at   timestamptz NOT NULL,
    macs      bytea NOT NULL CHECK (octet_length(macs) = 16 * cardinality(ids)),
    mac       bytea NOT NULL CHECK (octet_length(mac) = 32)
);
CREATE INDEX audit_seal_of_round ON audit_seal (round, coalesce(tenant_id, 0), number);
CREATE UNIQUE INDEX audit_seal_of_tenant ON audit_seal (coalesce(tenant_id, 0), number);

-- Months that were given up after their time: what verification does not look for any more.
CREATE TABLE audit_retired (
    month      date PRIMARY KEY,
    rows       bigint NOT NULL,
    retired_at timestamptz NOT NULL DEFAULT now()
);

-- Gives up a month: only one that lies at least 90 days back, and never without a trace.
CREATE FUNCTION audit_retire_month(wanted date) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, public AS $$
DECLARE
    first date := date_trunc('month', wanted)::date;
    part text := 'audit_' || to_char(date_trunc('month', wanted), 'YYYYMM');
    wanted_from timestamptz := date_trunc('month', wanted) AT TIME ZONE 'UTC';
    gone bigint;
BEGIN
    IF first + interval '1 month' > now() AT TIME ZONE 'UTC' - interval '90 days' THEN
        RAISE EXCEPTION 'the audit keeps every month for at least 90 days';
    END IF;
    IF to_regclass('public.' || part) IS NULL THEN
        -- A month that was never made lies among the rest.
        DELETE FROM public.audit_rest WHERE at >= wanted_from AND at < wanted_from + interval '1 month';
        GET DIAGNOSTICS gone = ROW_COUNT;
    ELSE
        EXECUTE format('SELECT count(*) FROM public.%I', part) INTO gone;
        EXECUTE format('DROP TABLE public.%I', part);
    END IF;
    INSERT INTO public.audit_retired (month, rows) VALUES (first, gone) ON CONFLICT DO NOTHING;
    RETURN gone;
END $$;
