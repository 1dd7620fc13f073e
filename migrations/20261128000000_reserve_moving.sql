-- While an app changes size and number at once, what is reserved is not the larger number times the larger size. Where
-- a row has no sum of its own, its reservation is the product of its peak, as before.
ALTER TABLE app ADD COLUMN reserved_cpu bigint CHECK (reserved_cpu >= 0);
ALTER TABLE app ADD COLUMN reserved_memory bigint CHECK (reserved_memory >= 0);
