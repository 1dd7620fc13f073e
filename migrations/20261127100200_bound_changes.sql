-- What a tenant does is on record for months: how much of it a day has a limit too.
INSERT INTO quota_default (resource, limit_) VALUES ('changes_per_day', 20000);

-- The day that `used` is about, where a resource is counted by the day.
ALTER TABLE quota ADD COLUMN since date;

ALTER TABLE quota NO FORCE ROW LEVEL SECURITY;
INSERT INTO quota (tenant_id, resource) SELECT DISTINCT tenant_id, 'changes_per_day' FROM quota;
ALTER TABLE quota FORCE ROW LEVEL SECURITY;
