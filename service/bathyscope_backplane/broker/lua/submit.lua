-- Queues a job: dedupe, limits, hash, lists, and its place in the lane or behind its parents, at once. One that is
-- split waits for its shards, [what it is, rows] each, which are queued in a lane of their own.

local record = prefix .. 'job:' .. id
if idempotency_key ~= '' then
  local known = redis.call('GET', prefix .. 'idem:' .. idempotency_key)
  if known then
    local body, first = string.match(known, '^(.*)|([^|]*)$')
    if redis.call('EXISTS', prefix .. 'job:' .. first) == 1 then
      if body ~= idempotency_body then return { 'mismatch', first } end
      return { 'replayed', first }
    end
  end
end
-- The caller drew this id for this job, so this is the same submit, sent again by a connection that broke.
if redis.call('EXISTS', record) == 1 then return { 'queued', id } end

local load_of_lane = tonumber(redis.call('HGET', prefix .. 'lane_load', lane) or '0')
if load_of_lane >= lane_limit then return { 'lane_full', tostring(load_of_lane) } end
local load_of_owner = tonumber(redis.call('HGET', prefix .. 'owner_load', owner) or '0')
if load_of_owner >= owner_limit then return { 'owner_full', tostring(load_of_owner) } end
local asked = tonumber(redis.call('GET', inputs_key(owner)) or '0')
if inputs_limit >= 0 and inputs > 0 and asked + inputs > inputs_limit then
  return { 'inputs_full', tostring(asked), tostring(DAY_MS - now % DAY_MS) }
end
local promised = tonumber(redis.call('HGET', prefix .. 'owner_bytes', owner) or '0')
if bytes_limit >= 0 and bytes_stored + promised + bytes > bytes_limit then
  return { 'bytes_full', string.format('%.0f', promised) }
end

local unmet, problem = 0, nil
for _, parent in ipairs(parents) do
  local status, cause = unpack(redis.call('HMGET', prefix .. 'job:' .. parent, 'status', 'error'))
  if not status then
    problem = problem or dependency_problem(parent, 'does not exist, or not any more', nil)
  elseif HOW[status] then
    problem = problem or dependency_problem(parent, HOW[status], cause)
  elseif status ~= 'succeeded' then
    unmet = unmet + 1
    redis.call('SADD', prefix .. 'children:' .. parent, id)
  end
end

local sequence = next_number()
redis.call('HSET', record, 'status', 'queued', 'state', 'waiting', 'created_at', now, 'sequence', sequence,
  'attempt', '0', 'group_deaths', '0', 'solo', '0', 'alone', '0', 'unmet', unmet, unpack(fields))
if idempotency_key ~= '' then
  redis.call('SET', prefix .. 'idem:' .. idempotency_key, idempotency_body .. '|' .. id,
    'PX', terms.idempotency_ttl_ms)
end
redis.call('ZADD', prefix .. 'jobs', 0, id)
redis.call('ZADD', prefix .. 'jobs:' .. owner, 0, id)
redis.call('ZADD', prefix .. 'expiry', now + terms.queue_ttl_ms, id)
add('lane_load', lane, 1)
add('owner_load', owner, 1)
if bytes > 0 then
  redis.call('HSET', record, 'bytes', bytes)
  add('owner_bytes', owner, bytes)
end
if inputs > 0 then
  redis.call('INCRBY', inputs_key(owner), inputs)
  redis.call('PEXPIRE', inputs_key(owner), 2 * DAY_MS)
end
add('tally', 'queued', 1)

if #shards > 0 then
  local rows, attempts = 0, redis.call('HGET', record, 'max_attempts')
  for number, shard in ipairs(shards) do
    local part, its_sequence = shard_id(id, number - 1), next_number()
    redis.call('HSET', prefix .. 'job:' .. part, 'id', part, 'kind', 'shard', 'lane', shard_lane, 'owner', owner,
      'priority', priority, 'max_attempts', attempts, 'shard', shard[1], 'rows', shard[2], 'status', 'queued',
      'created_at', now, 'sequence', its_sequence, 'attempt', '0', 'group_deaths', '0', 'solo', '0', 'alone', '0',
      'unmet', '0')
    add('lane_load', shard_lane, 1)
    make_ready(part, { lane = shard_lane, owner = owner, class = CLASS[priority], sequence = its_sequence, solo = '0' })
    rows = rows + shard[2]
  end
  redis.call('HSET', record, 'state', 'split', 'shards', #shards, 'rows', rows, 'unmet', #shards)
elseif problem then
  end_job(id, load(id), 'failed', problem, { 'reason', 'dependency_failed' })
elseif unmet > 0 then
  redis.call('SADD', prefix .. 'waiting', id)
else
  make_ready(id, { lane = lane, owner = owner, class = CLASS[priority], sequence = sequence, solo = '0' })
end
return { 'queued', id }
