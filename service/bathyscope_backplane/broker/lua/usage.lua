-- What an owner uses of its quota just now.

local function number(value)
  return tonumber(value or '0')
end
return {
  number(redis.call('HGET', prefix .. 'owner_load', owner)),
  number(redis.call('GET', inputs_key(owner))),
  number(redis.call('HGET', prefix .. 'owner_bytes', owner)),
  math.ceil(DAY_MS - now % DAY_MS),
}
