-- What is in the registry, by tenant. Tags live here alone: the registry behind the front door
-- knows manifests by digest, so a tag can be deleted by itself and none moves behind our back.

CREATE TABLE robot (
    tenant_id    bigint NOT NULL REFERENCES tenant (id),
    id           bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name         text NOT NULL CHECK (name ~ '^[a-z][a-z0-9-]{0,30}[a-z0-9]$'),
    push         boolean NOT NULL,
    hash         bytea NOT NULL CHECK (octet_length(hash) = 32),
    created_by   text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    last_used_at timestamptz,
    revoked_at   timestamptz,
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX robot_name_is_taken ON robot (tenant_id, name) WHERE revoked_at IS NULL;

-- A manifest is written down before it is handed on (confirmed = false), so that a crash between
-- the two leaves a trace that is looked after. One that goes is doomed first: from then on it is not
-- there for anybody, and the row goes when the registry has let go of it. Blobs alike.
CREATE TABLE manifest (
    tenant_id  bigint NOT NULL REFERENCES tenant (id),
    repository text NOT NULL CHECK (char_length(repository) BETWEEN 1 AND 128),
    digest     text NOT NULL CHECK (digest ~ '^sha256:[0-9a-f]{64}$'),
    media_type text NOT NULL,
    size       bigint NOT NULL CHECK (size > 0),
    total      bigint NOT NULL CHECK (total >= 0),
    confirmed  boolean NOT NULL DEFAULT false,
    pushed_by  text NOT NULL,
    pushed_at  timestamptz NOT NULL DEFAULT now(),
    doomed_at  timestamptz,
    PRIMARY KEY (tenant_id, repository, digest)
);
CREATE INDEX manifest_unconfirmed ON manifest (pushed_at) WHERE NOT confirmed;
CREATE INDEX manifest_doomed ON manifest (doomed_at) WHERE doomed_at IS NOT NULL;

-- What a manifest needs: its config and layers, or the manifests of an index.
CREATE TABLE manifest_part (
    tenant_id  bigint NOT NULL,
    repository text NOT NULL,
    digest     text NOT NULL,
    part       text NOT NULL CHECK (part ~ '^sha256:[0-9a-f]{64}$'),
    is_blob    boolean NOT NULL,
    PRIMARY KEY (tenant_id, repository, digest, part),
    FOREIGN KEY (tenant_id, repository, digest) REFERENCES manifest ON DELETE CASCADE
);
CREATE INDEX manifest_part_by_part ON manifest_part (tenant_id, part);

CREATE TABLE tag (
    tenant_id  bigint NOT NULL,
    repository text NOT NULL,
    name       text NOT NULL CHECK (name ~ '^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$'),
    digest     text NOT NULL,
    pushed_by  text NOT NULL,
    pushed_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, repository, name),
    FOREIGN KEY (tenant_id, repository, digest) REFERENCES manifest (tenant_id, repository, digest)
);
CREATE INDEX tag_by_digest ON tag (tenant_id, repository, digest);

-- Blobs of a tenant: each counts once, however many repositories hold it.
CREATE TABLE blob (
    tenant_id bigint NOT NULL REFERENCES tenant (id),
    digest    text NOT NULL CHECK (digest ~ '^sha256:[0-9a-f]{64}$'),
    size      bigint NOT NULL CHECK (size >= 0),
    at        timestamptz NOT NULL DEFAULT now(),
    doomed_at timestamptz,
    PRIMARY KEY (tenant_id, digest)
);
CREATE TABLE blob_place (
    tenant_id  bigint NOT NULL,
    digest     text NOT NULL,
    repository text NOT NULL,
    PRIMARY KEY (tenant_id, digest, repository),
    FOREIGN KEY (tenant_id, digest) REFERENCES blob (tenant_id, digest) ON DELETE CASCADE
);

-- Bytes of uploads under way; they count until the blob is there or two hours have passed.
CREATE TABLE upload (
    tenant_id  bigint NOT NULL REFERENCES tenant (id),
    id         text NOT NULL CHECK (char_length(id) BETWEEN 1 AND 64),
    bytes      bigint NOT NULL DEFAULT 0,
    changed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);
