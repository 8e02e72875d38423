-- Takes a resource out. It is due for the sweep until its objects are gone from the store too, and cannot be entered
-- again by whoever read its manifest before: a worker whose answer was lost, a rebuild.

local prefix, id, kind, owner, now_ms, gone_seconds, tombstone_seconds = KEYS[1], unpack(ARGV)
redis.call('DEL', prefix .. ':' .. id)
redis.call('ZREM', prefix .. 'list:' .. kind .. ':' .. owner, id)
redis.call('ZREM', prefix .. 'list:' .. kind .. ':', id)
local bytes = redis.call('HGET', prefix .. 'sizes', id)
if bytes then
  redis.call('HDEL', prefix .. 'sizes', id)
  local left = bytes == '0' and 1 or redis.call('HINCRBY', prefix .. 'bytes', owner, '-' .. bytes)
  if left <= 0 then redis.call('HDEL', prefix .. 'bytes', owner) end
end
redis.call('SET', prefix .. 'gone:' .. id, '1', 'EX', gone_seconds)
redis.call('ZADD', prefix .. 'expiry', now_ms, id)
if tombstone_seconds ~= '0' then redis.call('SET', prefix .. 'tomb:' .. id, owner, 'EX', tombstone_seconds) end
return 1
