-- Claims an adapter's digest, for a base, and its name for an owner, and a share in its files -> 'ok' and the blobs to
-- name, or what is taken ('digest', 'name') and by whom, '<id>|<job>'. Claims in `dead` are those of jobs that came to
-- nothing.

local prefix, id, job, owner, digest, base, name, blobs, now_ms = KEYS[1], unpack(ARGV)
local mine, dead = id .. '|' .. job, {}
for i = 9, #ARGV do dead[ARGV[i]] = true end
local digests, names = prefix .. 'digests:' .. owner, prefix .. 'names:' .. owner
local made = digest .. '|' .. base

local known = redis.call('HGET', digests, made)
if known and known ~= mine and not dead[known] then return { 'digest', known } end
local named = name ~= '' and redis.call('HGET', names, name)
if named and named ~= mine and not dead[named] then return { 'name', named } end
redis.call('HSET', digests, made, mine)
if name ~= '' then redis.call('HSET', names, name, mine) end
local shared = redis.call('HGET', prefix .. 'shared', digest)
if not shared then
  shared = blobs
  redis.call('HSET', prefix .. 'shared', digest, blobs)
end
redis.call('ZADD', prefix .. 'refs:' .. cjson.decode(shared).weights.key, now_ms, mine)
return { 'ok', shared }
