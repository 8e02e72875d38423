-- Puts a dead letter back into its lane with its counters cleared.

local job = load(id)
if not job or not redis.call('ZSCORE', prefix .. 'dead', id) then return 0 end
redis.call('ZREM', prefix .. 'dead', id)
redis.call('DEL', prefix .. 'tomb:' .. id)
redis.call('PERSIST', prefix .. 'job:' .. id)
redis.call('PERSIST', prefix .. 'events:' .. id)
redis.call('HDEL', prefix .. 'job:' .. id, 'dead_letter', 'finished_at', 'expires_at', 'started_at', 'error', 'cancel',
  'progress', 'settled')
if job.webhook then -- what was not delivered yet told of the end that is undone now
  redis.call('HDEL', prefix .. 'job:' .. id, 'hook_state', 'hook_attempts', 'hook_token', 'hook_status', 'hook_detail',
    'hook_next_at', 'hook_delivered_at')
  hook_off(job.owner, hook_host(job.webhook), id)
end
if secret ~= '' then write(id, 'secret', secret) end
write(id, 'status', 'queued', 'attempt', '0', 'group_deaths', '0', 'solo', '0', 'reason', 'replay')
redis.call('ZADD', prefix .. 'expiry', now + terms.queue_ttl_ms, id)
change_status(job, 'queued')
add('lane_load', job.lane, 1)
add('owner_load', job.owner, 1)
if job.bytes then add('owner_bytes', job.owner, tonumber(job.bytes)) end
job.solo = '0'
make_ready(id, job)
announce(id, 'status', cjson.encode({ status = 'queued', attempt = 0, reason = 'replay' }), 'queued')
return 1
