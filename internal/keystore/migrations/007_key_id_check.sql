-- The same check as before, by a pattern that takes a fifth of the time: an import checks a million ids. Not valid: the old
-- check has held for every row, and the whole table need not be read again while it is locked.
alter table rekall.api_keys
	drop constraint api_keys_id_check,
	add constraint api_keys_id_check check (left(id, 4) = 'key_' and char_length(id) = 26 and substr(id, 5) !~ '[^0-9A-Za-z]') not valid;
