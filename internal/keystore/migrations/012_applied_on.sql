-- Whose transactions an edge's snapshot names. Others' numbers say nothing: after a dump was restored, a crash or a failover the same
-- number is another transaction's.
alter table rekall.edges add applied_on text check (char_length(applied_on) <= 200); -- null: unknown, or reported by an older edge
