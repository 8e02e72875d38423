-- Enters a committed resource -> 2 it is new, 1 it was there, 0 it was deleted lately and stays so.
-- However often it is entered, its bytes count once. Of an adapter, what it claims and shares is entered too:
-- `digest`, `base`, `name` and `blobs`, which are empty for all others.

local prefix, id, kind, owner, created_ms, expires_ms, bytes, manifest = KEYS[1], unpack(ARGV)
local job, digest, base, name, blobs = unpack(ARGV, 8)
if redis.call('EXISTS', prefix .. 'gone:' .. id) == 1 then return 0 end
local known = redis.call('EXISTS', prefix .. ':' .. id)
redis.call('SET', prefix .. ':' .. id, manifest)
redis.call('ZADD', prefix .. 'list:' .. kind .. ':' .. owner, created_ms, id)
redis.call('ZADD', prefix .. 'list:' .. kind .. ':', created_ms, id)
if expires_ms ~= '' then redis.call('ZADD', prefix .. 'expiry', expires_ms, id) end
if redis.call('HSETNX', prefix .. 'sizes', id, bytes) == 1 then
  redis.call('HINCRBY', prefix .. 'bytes', owner, bytes)
end
if digest ~= '' then
  redis.call('HSETNX', prefix .. 'digests:' .. owner, digest .. '|' .. base, id .. '|' .. job)
  if name ~= '' then redis.call('HSETNX', prefix .. 'names:' .. owner, name, id .. '|' .. job) end
  redis.call('HSETNX', prefix .. 'shared', digest, blobs)
  redis.call('ZADD', prefix .. 'refs:' .. cjson.decode(blobs).weights.key, created_ms, id .. '|' .. job)
end
return 2 - known
