-- Enters a committed resource -> 2 it is new, 1 it was there, 0 it was deleted lately and stays so.
-- However often it is entered, its bytes count once.

local prefix, id, kind, owner, created_ms, expires_ms, bytes, manifest = KEYS[1], unpack(ARGV)
if redis.call('EXISTS', prefix .. 'gone:' .. id) == 1 then return 0 end
local known = redis.call('EXISTS', prefix .. ':' .. id)
redis.call('SET', prefix .. ':' .. id, manifest)
redis.call('ZADD', prefix .. 'list:' .. kind .. ':' .. owner, created_ms, id)
redis.call('ZADD', prefix .. 'list:' .. kind .. ':', created_ms, id)
if expires_ms ~= '' then redis.call('ZADD', prefix .. 'expiry', expires_ms, id) end
if redis.call('HSETNX', prefix .. 'sizes', id, bytes) == 1 then
  redis.call('HINCRBY', prefix .. 'bytes', owner, bytes)
end
return 2 - known
