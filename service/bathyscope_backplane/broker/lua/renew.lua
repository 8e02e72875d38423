-- Extends leases. A lease that ran out but was not taken back yet is still good.

local reply = {}
for i, ref in ipairs(refs) do
  local job = held(ref[1], ref[2], ref[3], '')
  if job then
    redis.call('ZADD', prefix .. 'leases', now + lease_ms, ref[1])
    reply[i] = job.cancel == '1' and 2 or 1
  else
    reply[i] = 0
  end
end
return reply
