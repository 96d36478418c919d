-- When a key was used last stands beside its count, so that a flush writes one row for each key and not two. last_used
-- follows once in an hour, when a key is first used in it.
alter table rekall.usage add used_at timestamptz; -- the last request; null: it was denied, or counted by an older edge
