-- A share in the files of a digest that others have brought already -> their blobs, or nothing when there are none.

local prefix, mine, digest, now_ms = KEYS[1], unpack(ARGV)
local shared = redis.call('HGET', prefix .. 'shared', digest)
if shared then redis.call('ZADD', prefix .. 'refs:' .. cjson.decode(shared).weights.key, now_ms, mine) end
return shared
