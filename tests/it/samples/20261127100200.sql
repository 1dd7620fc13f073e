UPDATE quota SET used = 3, since = '2026-11-27' WHERE resource = 'changes_per_day';
