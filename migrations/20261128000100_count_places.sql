-- A blob that is mounted in further repositories takes a folder in each: each counts 32 KiB. A repository that is being
-- removed is marked first: nothing is pushed to it while its folders go.

ALTER TABLE repository ADD COLUMN going boolean NOT NULL DEFAULT false;

-- The owner of these tables may be one whom row level security binds: then it would count nothing.
ALTER TABLE quota NO FORCE ROW LEVEL SECURITY;
ALTER TABLE blob_place NO FORCE ROW LEVEL SECURITY;

UPDATE quota q SET used = used + coalesce((SELECT sum(32768 * (p.n - 1)) FROM
    (SELECT count(*) AS n FROM blob_place b WHERE b.tenant_id = q.tenant_id GROUP BY b.digest) p), 0)
WHERE q.resource = 'registry_bytes';

ALTER TABLE quota FORCE ROW LEVEL SECURITY;
ALTER TABLE blob_place FORCE ROW LEVEL SECURITY;
