-- Puts a dead letter back into its lane with its counters cleared; of one that was split, those of its shards that did
-- not succeed.

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
local unmet = 0
if job.shards > 0 then write(id, 'state', 'split', 'shard_attempt', '0') end
for number = 0, job.shards - 1 do
  local part = shard_id(id, number)
  local shard = load(part)
  redis.call('PERSIST', prefix .. 'job:' .. part)
  if shard and shard.status ~= 'succeeded' then
    unmet = unmet + 1
    shard_done(part, shard, 0)
    if shard.state == 'running' then -- it was told to stop: that attempt is over
      redis.call('ZREM', prefix .. 'leases', part)
      count_running(shard, -1)
    end
    redis.call('HDEL', prefix .. 'job:' .. part, 'dead_letter', 'finished_at', 'error', 'cancel', 'settled', 'token')
    write(part, 'status', 'queued', 'attempt', '0', 'group_deaths', '0', 'solo', '0', 'alone', '0', 'reason', 'replay')
    add('lane_load', shard.lane, 1)
    shard.solo = '0'
    make_ready(part, shard)
  end
end
if unmet > 0 then write(id, 'unmet', unmet) else make_ready(id, job) end
announce(id, 'status', cjson.encode({ status = 'queued', attempt = 0, reason = 'replay' }), 'queued')
return 1
