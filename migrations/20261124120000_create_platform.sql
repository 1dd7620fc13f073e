-- The platform's first tables. Every tenant table carries tenant_id and is keyed by it, so that a
-- child can never point across tenants.

-- One row: what this database belongs to. The pools are fixed for life: an id that was given
-- under one pool must never be computed under another.
CREATE TABLE installation (
    one            boolean PRIMARY KEY DEFAULT true CHECK (one),
    id             text NOT NULL CHECK (id ~ '^[a-z]{4}$'),
    uid_start      bigint NOT NULL CHECK (uid_start >= 65536),
    uid_end        bigint NOT NULL CHECK (uid_end <= 2147483648 AND uid_end > uid_start),
    range_size     bigint NOT NULL CHECK (range_size BETWEEN 1024 AND 65536),
    block_size     bigint NOT NULL CHECK (block_size BETWEEN 16 AND 65536 AND range_size % block_size = 0),
    network_start  bigint NOT NULL CHECK (network_start BETWEEN 0 AND 4294967295),
    network_prefix int NOT NULL CHECK (network_prefix BETWEEN 8 AND 24),
    subnet_prefix  int NOT NULL CHECK (subnet_prefix BETWEEN network_prefix AND 28),
    created_at     timestamptz NOT NULL DEFAULT now()
);

-- A tenant's row is never deleted: it is what keeps its name from being given again.
CREATE TABLE tenant (
    id                  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name                text NOT NULL CONSTRAINT tenant_name_is_taken UNIQUE
                        CHECK (name ~ '^[a-z][a-z0-9-]{1,30}[a-z0-9]$'),
    display_name        text NOT NULL CHECK (char_length(display_name) BETWEEN 1 AND 120),
    state               text NOT NULL DEFAULT 'active'
                        CHECK (state IN ('active', 'suspended', 'offboarding', 'offboarded')),
    generation          bigint NOT NULL DEFAULT 1,
    observed_generation bigint NOT NULL DEFAULT 0,
    created_at          timestamptz NOT NULL DEFAULT now(),
    changed_at          timestamptz NOT NULL DEFAULT now(),
    offboarded_at       timestamptz
);

-- Limits and what is reserved, in one row per tenant: locking it is what makes a race for the
-- last bit of quota impossible. A limit may be lowered below what is used; then nothing new fits.
CREATE TABLE quota (
    tenant_id           bigint PRIMARY KEY REFERENCES tenant (id),
    cpu_millis          bigint NOT NULL CHECK (cpu_millis >= 0),
    memory              bigint NOT NULL CHECK (memory >= 0),
    apps                bigint NOT NULL CHECK (apps >= 0),
    instances           bigint NOT NULL CHECK (instances >= 0),
    registry_bytes      bigint NOT NULL CHECK (registry_bytes >= 0),
    used_cpu_millis     bigint NOT NULL DEFAULT 0 CHECK (used_cpu_millis >= 0),
    used_memory         bigint NOT NULL DEFAULT 0 CHECK (used_memory >= 0),
    used_apps           bigint NOT NULL DEFAULT 0 CHECK (used_apps >= 0),
    used_instances      bigint NOT NULL DEFAULT 0 CHECK (used_instances >= 0),
    used_registry_bytes bigint NOT NULL DEFAULT 0 CHECK (used_registry_bytes >= 0)
);

-- User ids. A slot comes from a sequence, so that no lock is held across a commit; the range is
-- computed from it; the exclusion constraint is the proof. Rows stay for ever: a range never
-- returns, so a file that was left behind never changes its owner.
CREATE SEQUENCE uid_slot MINVALUE 0 START 0;
CREATE TABLE uid_range (
    slot        bigint PRIMARY KEY DEFAULT nextval('uid_slot') CHECK (slot >= 0),
    tenant_id   bigint NOT NULL REFERENCES tenant (id),
    pool_start  bigint NOT NULL,
    pool_end    bigint NOT NULL,
    size        bigint NOT NULL CHECK (size > 0),
    r           int8range NOT NULL GENERATED ALWAYS AS
                (int8range(pool_start + slot * size, pool_start + (slot + 1) * size)) STORED,
    given_blocks bigint NOT NULL DEFAULT 0,
    block_size  bigint NOT NULL CHECK (block_size > 0 AND size % block_size = 0),
    given_at    timestamptz NOT NULL DEFAULT now(),
    released_at timestamptz,
    UNIQUE (tenant_id, slot),
    CONSTRAINT uid_range_within_runtime_limit CHECK (upper(r) <= 2147483648),
    CONSTRAINT uid_pool_is_used_up CHECK (upper(r) <= pool_end),
    CONSTRAINT uid_range_is_full CHECK (given_blocks * block_size <= size),
    CONSTRAINT uid_ranges_do_not_overlap EXCLUDE USING gist (r WITH &&)
);
CREATE INDEX uid_range_by_tenant ON uid_range (tenant_id, slot);

-- Networks: the number names the bridge and picks the subnet; it is never given again.
CREATE SEQUENCE network_number MINVALUE 0 START 0;
CREATE TABLE network (
    tenant_id bigint PRIMARY KEY REFERENCES tenant (id),
    number    bigint NOT NULL DEFAULT nextval('network_number') UNIQUE CHECK (number >= 0),
    limit_    bigint NOT NULL,
    CONSTRAINT network_pool_is_used_up CHECK (number < limit_)
);

-- What the platform has to say about each part of a tenant.
CREATE TABLE tenant_condition (
    tenant_id bigint NOT NULL REFERENCES tenant (id),
    type      text NOT NULL,
    status    text NOT NULL CHECK (status IN ('true', 'false', 'unknown')),
    reason    text NOT NULL,
    message   text NOT NULL,
    since     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, type)
);

CREATE TABLE offboarding_step (
    tenant_id   bigint NOT NULL REFERENCES tenant (id),
    position    int NOT NULL,
    name        text NOT NULL,
    state       text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'running', 'done')),
    message     text NOT NULL DEFAULT '',
    started_at  timestamptz,
    finished_at timestamptz,
    PRIMARY KEY (tenant_id, position)
);

CREATE TABLE app (
    tenant_id           bigint NOT NULL REFERENCES tenant (id),
    id                  bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name                text NOT NULL CHECK (name ~ '^[a-z]([a-z0-9-]{0,43}[a-z0-9])?$'),
    generation          bigint NOT NULL DEFAULT 1,
    observed_generation bigint NOT NULL DEFAULT 0,
    revision            bigint NOT NULL DEFAULT 1,
    last_revision       bigint NOT NULL DEFAULT 1,
    -- The largest of what still runs and what shall run: what is reserved is computed from it.
    peak_instances      bigint NOT NULL CHECK (peak_instances >= 0),
    peak_surge          bigint NOT NULL CHECK (peak_surge IN (0, 1)),
    peak_cpu_millis     bigint NOT NULL CHECK (peak_cpu_millis > 0),
    peak_memory         bigint NOT NULL CHECK (peak_memory > 0),
    uid_slot            bigint NOT NULL,
    uid_start           bigint NOT NULL,
    uid_size            bigint NOT NULL,
    observed            jsonb,
    observed_at         timestamptz,
    problem             text,
    created_at          timestamptz NOT NULL DEFAULT now(),
    changed_at          timestamptz NOT NULL DEFAULT now(),
    deleted_at          timestamptz,
    removed_at          timestamptz,
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, uid_slot) REFERENCES uid_range (tenant_id, slot),
    CONSTRAINT app_block_is_given_once EXCLUDE USING gist (int8range(uid_start, uid_start + uid_size) WITH &&)
);
CREATE INDEX app_by_age ON app (tenant_id, created_at);
CREATE UNIQUE INDEX app_name_is_taken ON app (tenant_id, name) WHERE removed_at IS NULL;

-- Insert-only: what was released stays as it was.
CREATE TABLE release (
    tenant_id    bigint NOT NULL,
    app_id       bigint NOT NULL,
    revision     bigint NOT NULL,
    spec         jsonb NOT NULL,
    repository   text NOT NULL,
    tag          text,
    index_digest text NOT NULL CHECK (index_digest ~ '^sha256:[0-9a-f]{64}$'),
    digest       text NOT NULL CHECK (digest ~ '^sha256:[0-9a-f]{64}$'),
    inside_uid   int NOT NULL CHECK (inside_uid BETWEEN 1 AND 65535),
    inside_gid   int NOT NULL CHECK (inside_gid BETWEEN 1 AND 65535),
    warnings     jsonb NOT NULL DEFAULT '[]',
    rolled_back_to bigint,
    actor        text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, app_id, revision),
    FOREIGN KEY (tenant_id, app_id) REFERENCES app (tenant_id, id)
);
CREATE INDEX release_by_digest ON release (tenant_id, repository, digest);
CREATE INDEX release_by_index_digest ON release (tenant_id, repository, index_digest);

-- Addresses of a tenant's subnet: host is the n-th address. A freed one rests before it is given
-- again, so that no rule of the former owner can still be in force. An app's addresses are in the
-- order in which it took them: what runs at the n-th one stays there when more are taken.
CREATE TABLE app_address (
    tenant_id bigint NOT NULL REFERENCES tenant (id),
    host      bigint NOT NULL CHECK (host >= 2),
    app_id    bigint,
    taken_at  timestamptz NOT NULL DEFAULT now(),
    freed_at  timestamptz,
    PRIMARY KEY (tenant_id, host),
    FOREIGN KEY (tenant_id, app_id) REFERENCES app (tenant_id, id)
);
CREATE INDEX app_address_by_app ON app_address (tenant_id, app_id);

CREATE TABLE app_event (
    tenant_id bigint NOT NULL,
    app_id    bigint NOT NULL,
    seq       bigint NOT NULL,
    at        timestamptz NOT NULL,
    kind      text NOT NULL,
    text      text NOT NULL,
    PRIMARY KEY (tenant_id, app_id, at, seq),
    FOREIGN KEY (tenant_id, app_id) REFERENCES app (tenant_id, id)
);

CREATE TABLE machine_event (
    id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    seq  bigint NOT NULL,
    at   timestamptz NOT NULL,
    kind text NOT NULL,
    text text NOT NULL,
    UNIQUE (at, seq)
);

-- Work for reconcilers: one row per object for life, so duplicates cannot exist. Only the
-- database's clock decides; an expired lease is just a due_at that has passed.
CREATE TABLE work (
    kind        text NOT NULL,
    object_id   bigint NOT NULL,
    tenant_id   bigint NOT NULL REFERENCES tenant (id),
    due_at      timestamptz NOT NULL DEFAULT now(),
    wake        bigint NOT NULL DEFAULT 1,
    seen        bigint NOT NULL DEFAULT 0,
    epoch       bigint NOT NULL DEFAULT 0,
    attempt     int NOT NULL DEFAULT 0,
    parked_at   timestamptz,
    error_class text,
    error       text,
    PRIMARY KEY (kind, object_id)
) WITH (fillfactor = 50);
CREATE INDEX work_due ON work (due_at) WHERE parked_at IS NULL;

-- Answers of POST requests, kept for a day, so that a repeated one is not done twice.
CREATE TABLE idempotency (
    actor        text NOT NULL,
    key          text NOT NULL CHECK (char_length(key) BETWEEN 1 AND 200),
    request_hash bytea NOT NULL,
    status       int NOT NULL,
    response     jsonb NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (actor, key)
);
CREATE INDEX idempotency_by_age ON idempotency (created_at);

-- Who did what. Insert-only.
CREATE TABLE audit (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         timestamptz NOT NULL DEFAULT now(),
    tenant_id  bigint REFERENCES tenant (id),
    actor      text NOT NULL,
    action     text NOT NULL,
    object     text NOT NULL,
    request_id text NOT NULL,
    detail     jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_by_tenant ON audit (tenant_id, id);

-- Credentials: only hashes of what was shown once.
CREATE TABLE api_token (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hash         bytea NOT NULL UNIQUE CHECK (octet_length(hash) = 32),
    name         text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 60),
    tenant_id    bigint REFERENCES tenant (id),
    role         text NOT NULL,
    created_by   text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    last_used_at timestamptz,
    revoked_at   timestamptz,
    CHECK (CASE WHEN tenant_id IS NULL THEN role IN ('auditor', 'admin')
                ELSE role IN ('viewer', 'deployer', 'owner') END)
);
CREATE INDEX api_token_by_tenant ON api_token (tenant_id, id);

CREATE TABLE session (
    hash         bytea PRIMARY KEY CHECK (octet_length(hash) = 32),
    token_id     bigint NOT NULL REFERENCES api_token (id),
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX session_by_age ON session (created_at);

CREATE TABLE first_admin_link (
    hash       bytea PRIMARY KEY CHECK (octet_length(hash) = 32),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at    timestamptz
);

-- Which refused fields people try: names only, so that the format can grow where it is wanted.
CREATE TABLE refused_field (
    name  text PRIMARY KEY CHECK (char_length(name) <= 64),
    count bigint NOT NULL DEFAULT 1,
    last_at timestamptz NOT NULL DEFAULT now()
);
