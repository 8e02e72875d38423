-- Notes how an attempt at a delivery went: `delivered`, `failed` or `refused` for good, or `pending` and again after
-- `pause_ms`, unless the job's record is gone by then. An attempt that was broken off does not count.

local job = load(id)
if not job then
  hook_off(owner, host, id)
  return 0
end
local record = prefix .. 'job:' .. id
if redis.call('HGET', record, 'hook_token') ~= token then return 0 end
redis.call('HDEL', record, 'hook_token')
local due = now + pause_ms
if state == 'pending' and not broken_off and due >= tonumber(job.expires_at) then state = 'failed' end
write(id, 'hook_state', state, 'hook_next_at', state == 'pending' and due or '')
if broken_off then
  redis.call('HINCRBY', record, 'hook_attempts', -1)
else
  write(id, 'hook_status', status > 0 and status or '', 'hook_detail', detail)
end
if state == 'delivered' then write(id, 'hook_delivered_at', now) end
hook_off(owner, host, id)
if state == 'pending' then hook_due(owner, host, id, due) end
return 1
