-- Row level security under everything that belongs to a tenant.

GRANT USAGE ON SCHEMA public TO bulkhead_runtime, bulkhead_reconciler;
GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO bulkhead_runtime, bulkhead_reconciler;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO bulkhead_runtime, bulkhead_reconciler;
-- The audit's months are reached through the audit alone.
DO $$
DECLARE
    part regclass;
BEGIN
    FOR part IN SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'audit'::regclass LOOP
        EXECUTE format('REVOKE ALL ON %s FROM bulkhead_runtime, bulkhead_reconciler', part);
    END LOOP;
END $$;

-- What requests may write.
GRANT INSERT ON installation, refused_field TO bulkhead_runtime;
GRANT UPDATE ON refused_field TO bulkhead_runtime;
GRANT INSERT, UPDATE ON tenant, quota, uid_range, tenant_condition, work TO bulkhead_runtime;
GRANT INSERT ON network, offboarding_step, release TO bulkhead_runtime;
GRANT INSERT, UPDATE ON app, app_address, robot, manifest, tag, blob, upload TO bulkhead_runtime;
GRANT INSERT ON manifest_part, blob_place TO bulkhead_runtime;
GRANT DELETE ON manifest, manifest_part, tag, blob, blob_place, upload TO bulkhead_runtime;
GRANT INSERT, UPDATE, DELETE ON idempotency, first_admin_link TO bulkhead_runtime;
GRANT INSERT, UPDATE ON account, api_token, service_account, invitation TO bulkhead_runtime;
GRANT INSERT, UPDATE, DELETE ON account_identity, second_factor, recovery_code, membership, session, sign_in,
    throttle, known_place TO bulkhead_runtime;
-- Insert-only, and neither the time nor the number nor the transaction is the writer's to choose.
GRANT INSERT (tenant_id, actor, via, action, object, result, request_id, detail) ON audit TO bulkhead_runtime, bulkhead_reconciler;

-- What reconcilers may write.
GRANT INSERT, UPDATE, DELETE ON work, tenant_condition, app_event, machine_event TO bulkhead_reconciler;
GRANT UPDATE ON tenant, quota, uid_range, offboarding_step, app, app_address, robot, manifest, tag, blob, upload,
    api_token TO bulkhead_reconciler;
GRANT INSERT ON app_address TO bulkhead_reconciler;
GRANT DELETE ON manifest, manifest_part, tag, blob, blob_place, upload, idempotency, session, sign_in, throttle,
    known_place, refused_field TO bulkhead_reconciler;
GRANT INSERT ON audit_round, audit_seal TO bulkhead_reconciler;
GRANT INSERT ON installation TO bulkhead_reconciler;

-- The rows of the tenant that the transaction has named; without a name there are none.
DO $$
DECLARE
    part text;
BEGIN
    FOREACH part IN ARRAY ARRAY[
        'quota', 'uid_range', 'network', 'tenant_condition', 'offboarding_step', 'app', 'release', 'app_address',
        'app_event', 'work', 'robot', 'manifest', 'manifest_part', 'tag', 'blob', 'blob_place', 'upload',
        'membership', 'service_account', 'api_token', 'invitation', 'audit', 'audit_seal'
    ] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', part);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', part);
        EXECUTE format(
            'CREATE POLICY of_tenant ON %I TO bulkhead_runtime '
            'USING (tenant_id = (SELECT nullif(current_setting(''app.tenant'', true), '''')::bigint)) '
            'WITH CHECK (tenant_id = (SELECT nullif(current_setting(''app.tenant'', true), '''')::bigint))', part);
        EXECUTE format('CREATE POLICY of_reconciler ON %I TO bulkhead_reconciler USING (true) WITH CHECK (true)', part);
    END LOOP;
    -- What the platform's own people see of all tenants, when the transaction says that it is theirs.
    FOREACH part IN ARRAY ARRAY['quota', 'uid_range', 'app', 'audit', 'api_token', 'membership', 'invitation'] LOOP
        EXECUTE format(
            'CREATE POLICY of_platform ON %I FOR SELECT TO bulkhead_runtime '
            'USING ((SELECT current_setting(''app.platform'', true)) = ''on'')', part);
    END LOOP;
    -- What belongs to no tenant is the platform's: nobody within a tenant reads or writes it.
    FOREACH part IN ARRAY ARRAY['audit', 'api_token', 'invitation'] LOOP
        EXECUTE format(
            'CREATE POLICY of_platform_insert ON %I FOR INSERT TO bulkhead_runtime WITH CHECK (tenant_id IS NULL '
            'AND (SELECT current_setting(''app.platform'', true)) = ''on'')', part);
    END LOOP;
    FOREACH part IN ARRAY ARRAY['api_token', 'invitation'] LOOP
        EXECUTE format(
            'CREATE POLICY of_platform_update ON %I FOR UPDATE TO bulkhead_runtime '
            'USING (tenant_id IS NULL AND (SELECT current_setting(''app.platform'', true)) = ''on'') '
            'WITH CHECK (tenant_id IS NULL)', part);
    END LOOP;
END $$;

-- Who stands behind a credential is asked before any tenant is known. These functions answer for exactly
-- the credential whose hash they are given; to them alone, the owner's own policies open the tables.
DO $$
DECLARE
    part text;
BEGIN
    FOREACH part IN ARRAY ARRAY['membership', 'service_account', 'api_token', 'invitation', 'audit'] LOOP
        EXECUTE format('CREATE POLICY of_functions ON %I FOR SELECT TO bulkhead_owner USING (true)', part);
    END LOOP;
END $$;

-- What a provider gave holds only while it goes on vouching: two weeks after somebody last came through one,
-- it is as if it were not there, whatever password or token they have meanwhile.
CREATE FUNCTION access_is_vouched_for(wanted bigint) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
    SELECT EXISTS (SELECT FROM public.account_identity i
                   WHERE i.account_id = wanted AND i.last_used_at > now() - interval '14 days')
$$;

-- Open links of somebody end wherever they lead: what they made, and what was made for them.
CREATE FUNCTION access_end_links(maker text, whom text) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    ended bigint;
BEGIN
    UPDATE public.invitation SET revoked_at = now()
    WHERE used_at IS NULL AND revoked_at IS NULL AND (created_by = maker OR recipient = whom);
    GET DIAGNOSTICS ended = ROW_COUNT;
    RETURN ended;
END $$;
CREATE POLICY of_functions_update ON invitation FOR UPDATE TO bulkhead_owner USING (true) WITH CHECK (true);

-- A new password ends every link for another one.
CREATE FUNCTION access_end_resets(wanted bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    ended bigint;
BEGIN
    UPDATE public.invitation SET revoked_at = now()
    WHERE kind = 'reset' AND account_id = wanted AND used_at IS NULL AND revoked_at IS NULL;
    GET DIAGNOSTICS ended = ROW_COUNT;
    RETURN ended;
END $$;

CREATE FUNCTION access_by_session(given bytea, wanted text)
RETURNS TABLE (account_id bigint, account text, platform_role text, session_id bigint, recent boolean,
               stale boolean, tenant_id bigint, tenant_state text, member_role text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT a.id, a.name,
           CASE WHEN a.platform_source IN ('local', 'hand') OR public.access_is_vouched_for(a.id) THEN a.platform_role END, s.id, s.confirmed_at > now() - interval '10 minutes', s.last_seen_at < now() - interval '1 minute',
           t.id, t.state, m.role
    FROM public.session s JOIN public.account a ON a.id = s.account_id
    LEFT JOIN public.tenant t ON t.name = wanted
    LEFT JOIN public.membership m ON m.tenant_id = t.id AND m.account_id = a.id
         AND (m.source = 'local' OR public.access_is_vouched_for(a.id))
    WHERE s.hash = given AND a.disabled_at IS NULL AND s.created_at > now() - interval '12 hours'
      AND s.last_seen_at > now() - interval '30 minutes';
END $$;

CREATE FUNCTION access_by_token(given bytea, wanted text)
RETURNS TABLE (token_id bigint, token text, token_role text, token_tenant bigint, expires_at timestamptz,
               stale boolean, account_id bigint, account text, platform_role text, service text, service_role text,
               tenant_id bigint, tenant_state text, member_role text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT k.id, k.name, k.role, k.tenant_id, k.expires_at,
           k.last_used_at IS NULL OR k.last_used_at < now() - interval '1 minute',
           a.id, a.name,
           CASE WHEN a.platform_source IN ('local', 'hand') OR public.access_is_vouched_for(a.id) THEN a.platform_role END,
           s.name, s.role, t.id, t.state, m.role
    FROM public.api_token k
    LEFT JOIN public.account a ON a.id = k.account_id
    LEFT JOIN public.service_account s ON s.tenant_id = k.tenant_id AND s.id = k.service_account_id
    LEFT JOIN public.tenant t ON t.name = wanted
    LEFT JOIN public.membership m ON m.tenant_id = k.tenant_id AND m.account_id = k.account_id
         AND (m.source = 'local' OR public.access_is_vouched_for(k.account_id))
    WHERE k.hash = given AND k.revoked_at IS NULL AND k.expires_at > now()
      AND (k.account_id IS NULL OR a.disabled_at IS NULL)
      AND (k.service_account_id IS NULL OR s.deleted_at IS NULL);
END $$;

-- A use is written down at most once a minute, by whoever holds the token.
CREATE FUNCTION access_note_use(given bytea) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
BEGIN
    UPDATE public.api_token SET last_used_at = now() WHERE hash = given;
    RETURN FOUND;
END $$;
CREATE POLICY of_functions_update ON api_token FOR UPDATE TO bulkhead_owner USING (true) WITH CHECK (true);

CREATE FUNCTION access_invitation(given bytea)
RETURNS TABLE (id bigint, kind text, tenant_id bigint, tenant text, tenant_state text, role text,
               platform_role text, recipient text, account_id bigint, created_by text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT i.id, i.kind, i.tenant_id, t.name, t.state, i.role, i.platform_role, i.recipient, i.account_id, i.created_by
    FROM public.invitation i LEFT JOIN public.tenant t ON t.id = i.tenant_id
    WHERE i.hash = given AND i.used_at IS NULL AND i.revoked_at IS NULL AND i.expires_at > now();
END $$;

-- Where one account belongs.
CREATE FUNCTION access_tenants_of(wanted bigint)
RETURNS TABLE (tenant_id bigint, tenant text, display_name text, tenant_state text, role text, source text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT t.id, t.name, t.display_name, t.state, m.role, m.source
    FROM public.membership m JOIN public.tenant t ON t.id = m.tenant_id
    WHERE m.account_id = wanted AND t.state IN ('active', 'suspended')
      AND (m.source = 'local' OR public.access_is_vouched_for(wanted)) ORDER BY t.name;
END $$;

-- One's own tokens, wherever they open.
CREATE FUNCTION access_tokens_of(wanted bigint)
RETURNS TABLE (id bigint, name text, tenant text, role text, created_at timestamptz, expires_at timestamptz,
               last_used_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT k.id, k.name, t.name, k.role, k.created_at, k.expires_at, k.last_used_at
    FROM public.api_token k LEFT JOIN public.tenant t ON t.id = k.tenant_id
    WHERE k.account_id = wanted AND k.revoked_at IS NULL AND k.expires_at > now() ORDER BY k.id;
END $$;

CREATE FUNCTION access_revoke_own(wanted bigint, token bigint) RETURNS TABLE (tenant_id bigint, name text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    UPDATE public.api_token k SET revoked_at = now()
    WHERE k.account_id = wanted AND k.id = token AND k.revoked_at IS NULL RETURNING k.tenant_id, k.name;
END $$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC;
GRANT EXECUTE ON FUNCTION access_by_session(bytea, text), access_by_token(bytea, text), access_note_use(bytea),
    access_invitation(bytea), access_tenants_of(bigint), access_tokens_of(bigint),
    access_revoke_own(bigint, bigint), access_end_links(text, text), access_end_resets(bigint),
    access_is_vouched_for(bigint) TO bulkhead_runtime;
GRANT EXECUTE ON FUNCTION audit_prepare_months(), audit_retire_month(date) TO bulkhead_reconciler;
