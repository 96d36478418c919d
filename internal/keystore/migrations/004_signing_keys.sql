-- The public keys with which backends verify identity tokens, of all edges that sign some. The private keys are in the
-- edges' memory only. A row lives as long as its edge renews it.

create table rekall.signing_keys (
	-- The key's thumbprint (RFC 7638), which tokens name as their kid.
	id         text primary key check (id ~ '^[0-9A-Za-z_-]{43}$'),
	public_key bytea not null check (octet_length(public_key) = 32), -- Ed25519
	instance   text not null check (instance ~ '^[0-9A-Za-z]{22}$'), -- of the edge, as in rekall.edges
	created_at timestamptz not null default now(),
	expires_at timestamptz not null
);
