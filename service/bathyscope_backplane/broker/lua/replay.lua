-- Puts a dead letter back into its lane with its counters cleared.

local job = load(id)
if not job or not redis.call('ZSCORE', prefix .. 'dead', id) then return 0 end
redis.call('ZREM', prefix .. 'dead', id)
redis.call('DEL', prefix .. 'tomb:' .. id)
redis.call('PERSIST', prefix .. 'job:' .. id)
redis.call('PERSIST', prefix .. 'events:' .. id)
redis.call('HDEL', prefix .. 'job:' .. id, 'dead_letter', 'finished_at', 'expires_at', 'started_at', 'error', 'cancel',
  'progress', 'settled')
write(id, 'status', 'queued', 'attempt', '0', 'group_deaths', '0', 'solo', '0', 'reason', 'replay')
redis.call('ZADD', prefix .. 'expiry', now + terms.queue_ttl_ms, id)
change_status(job, 'queued')
add('lane_load', job.lane, 1)
add('owner_load', job.owner, 1)
job.solo = '0'
make_ready(id, job)
announce(id, 'status', cjson.encode({ status = 'queued', attempt = 0, reason = 'replay' }), 'queued')
return 1
