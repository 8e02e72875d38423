-- Gives shares in the files behind `key` back, and claims with them -> 1 when nobody has any and the files may go.
-- Who comes later is not given these files any more, so that they are never removed under him.

local prefix, key, digest, base, owner, name = KEYS[1], unpack(ARGV)
local made = digest .. '|' .. base
for i = 6, #ARGV do
  redis.call('ZREM', prefix .. 'refs:' .. key, ARGV[i])
  for hash, field in pairs({ ['digests:' .. owner] = made, ['names:' .. owner] = name }) do
    if redis.call('HGET', prefix .. hash, field) == ARGV[i] then redis.call('HDEL', prefix .. hash, field) end
  end
end
-- While the catalogue is made anew, resources that have a share may not be known yet: the sweep decides later.
if redis.call('EXISTS', prefix .. 'refs:' .. key) == 1 or redis.call('EXISTS', prefix .. 'rebuilding') == 1 then
  return 0
end
local shared = redis.call('HGET', prefix .. 'shared', digest)
if shared and cjson.decode(shared).weights.key == key then redis.call('HDEL', prefix .. 'shared', digest) end
return 1
