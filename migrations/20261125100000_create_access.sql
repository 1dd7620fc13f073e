-- People, what they sign in with, where they belong, and what they were invited to. Before them the
-- database's own roles: `migrate` makes them; here they are made where they are missing (a test's database).
--
--   bulkhead_owner       owns the tables, cannot log in; assumed by `migrate` alone
--   bulkhead_runtime     requests: sees the rows of the tenant that its transaction has named
--   bulkhead_reconciler  reconcilers, sweeps, the audit's sealer: sees all tenants, by policy
--
-- None of them bypasses row level security.
DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['bulkhead_owner', 'bulkhead_runtime', 'bulkhead_reconciler'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL;
            END;
        END IF;
    END LOOP;
END $$;


-- Somebody who signs in. Never deleted: the audit speaks of them. No password means that they come
-- through a provider only.
CREATE TABLE account (
    id                  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name                text NOT NULL CONSTRAINT account_name_is_taken UNIQUE
                        CHECK (name ~ '^[a-z0-9]([a-z0-9._@+-]{0,62}[a-z0-9])?$'),
    display_name        text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 120),
    password            text CHECK (password LIKE '$argon2id$%'),
    password_changed_at timestamptz,
    platform_role       text CHECK (platform_role IN ('auditor', 'admin')),
    platform_source     text NOT NULL DEFAULT 'local',
    created_at          timestamptz NOT NULL DEFAULT now(),
    disabled_at         timestamptz
);
CREATE INDEX account_of_platform ON account (id) WHERE platform_role IS NOT NULL;

-- Who somebody is at a provider: its exact issuer and subject, never a name or an address.
CREATE TABLE account_identity (
    issuer       text NOT NULL,
    subject      text NOT NULL CHECK (octet_length(subject) BETWEEN 1 AND 255),
    account_id   bigint NOT NULL REFERENCES account (id),
    linked_at    timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (issuer, subject)
);
CREATE INDEX account_identity_by_account ON account_identity (account_id);

-- The second factor. The secret is sealed with a key that is not in the database.
CREATE TABLE second_factor (
    account_id   bigint PRIMARY KEY REFERENCES account (id),
    sealed       bytea NOT NULL,
    last_step    bigint NOT NULL DEFAULT 0,
    created_at   timestamptz NOT NULL DEFAULT now(),
    confirmed_at timestamptz
);
CREATE TABLE recovery_code (
    account_id bigint NOT NULL REFERENCES second_factor (account_id) ON DELETE CASCADE,
    hash       bytea NOT NULL CHECK (octet_length(hash) = 32),
    used_at    timestamptz,
    PRIMARY KEY (account_id, hash)
);

-- Who belongs to a tenant. `source` is 'local', or the provider whose claims say so.
CREATE TABLE membership (
    tenant_id  bigint NOT NULL REFERENCES tenant (id),
    account_id bigint NOT NULL REFERENCES account (id),
    role       text NOT NULL CHECK (role IN ('viewer', 'deployer', 'owner')),
    source     text NOT NULL DEFAULT 'local',
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, account_id)
);
CREATE INDEX membership_by_account ON membership (account_id, tenant_id);

-- Automation of a tenant. Its tokens may do at most what its role says now.
CREATE TABLE service_account (
    tenant_id  bigint NOT NULL REFERENCES tenant (id),
    id         bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name       text NOT NULL CHECK (name ~ '^[a-z][a-z0-9-]{0,30}[a-z0-9]$'),
    role       text NOT NULL CHECK (role IN ('viewer', 'deployer', 'owner')),
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX service_account_name_is_taken ON service_account (tenant_id, name) WHERE deleted_at IS NULL;

-- Whose a token is: a person's, a service account's, or (neither) made by root on the machine.
ALTER TABLE api_token
    ADD COLUMN account_id bigint REFERENCES account (id),
    ADD COLUMN service_account_id bigint;
ALTER TABLE api_token
    ADD FOREIGN KEY (tenant_id, service_account_id) REFERENCES service_account (tenant_id, id),
    ADD CHECK (num_nonnulls(account_id, service_account_id) <= 1),
    ADD CHECK (service_account_id IS NULL OR tenant_id IS NOT NULL);
CREATE INDEX api_token_by_account ON api_token (account_id, id);
DROP INDEX api_token_by_tenant;
-- Zero stands for the platform.
CREATE INDEX api_token_by_tenant ON api_token (coalesce(tenant_id, 0), id);
CREATE INDEX api_token_by_service ON api_token (tenant_id, service_account_id);

-- Sessions were kept for tokens; no version that did so was ever released. They are people's now.
DROP TABLE session;
CREATE TABLE session (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hash         bytea NOT NULL UNIQUE CHECK (octet_length(hash) = 32),
    account_id   bigint NOT NULL REFERENCES account (id),
    method       text NOT NULL,
    place        text NOT NULL,
    agent        text NOT NULL CHECK (char_length(agent) <= 200),
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now(),
    -- When the person last proved to be there: sensitive changes ask for it again.
    confirmed_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX session_by_account ON session (account_id, id);
CREATE INDEX session_by_age ON session (created_at);

-- A sign-in that has begun: the password was right and the second factor is awaited, or a provider
-- was asked. The reference is in the browser's cookie; here is its hash.
CREATE TABLE sign_in (
    hash       bytea PRIMARY KEY CHECK (octet_length(hash) = 32),
    kind       text NOT NULL CHECK (kind IN ('second-factor', 'provider')),
    account_id bigint REFERENCES account (id),
    provider   text,
    -- Set when it is no new session but the confirmation of one.
    session_id bigint REFERENCES session (id) ON DELETE CASCADE,
    tries      int NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX sign_in_by_account ON sign_in (account_id);
CREATE INDEX sign_in_by_age ON sign_in (expires_at);

-- Links that are used once: an invitation, or a new password. For one recipient, for a short time.
CREATE TABLE invitation (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hash          bytea NOT NULL UNIQUE CHECK (octet_length(hash) = 32),
    kind          text NOT NULL CHECK (kind IN ('invitation', 'reset')),
    tenant_id     bigint REFERENCES tenant (id),
    role          text CHECK (role IN ('viewer', 'deployer', 'owner')),
    platform_role text CHECK (platform_role IN ('auditor', 'admin')),
    recipient     text NOT NULL,
    account_id    bigint REFERENCES account (id),
    created_by    text NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz NOT NULL,
    used_at       timestamptz,
    revoked_at    timestamptz,
    CHECK (kind <> 'reset' OR account_id IS NOT NULL),
    CHECK (role IS NULL OR tenant_id IS NOT NULL),
    CHECK (platform_role IS NULL OR tenant_id IS NULL)
);
-- Zero stands for the platform.
CREATE INDEX invitation_by_maker ON invitation (created_by) WHERE used_at IS NULL AND revoked_at IS NULL;
CREATE INDEX invitation_by_recipient ON invitation (recipient) WHERE used_at IS NULL AND revoked_at IS NULL;
CREATE INDEX invitation_by_tenant ON invitation (coalesce(tenant_id, 0), id) WHERE used_at IS NULL AND revoked_at IS NULL;

-- How fast somebody may guess: when the bucket will be empty again (generic cell rate algorithm).
CREATE TABLE throttle (
    key bytea PRIMARY KEY CHECK (octet_length(key) = 32),
    tat timestamptz NOT NULL
) WITH (fillfactor = 50);
CREATE INDEX throttle_by_age ON throttle (tat);

-- Where an account has signed in from with success: guesses from elsewhere do not slow it down.
CREATE TABLE known_place (
    account_id bigint NOT NULL REFERENCES account (id),
    place      bytea NOT NULL CHECK (octet_length(place) = 32),
    last_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (account_id, place)
);
CREATE INDEX known_place_by_age ON known_place (last_at);
