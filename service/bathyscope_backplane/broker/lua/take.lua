-- Leases up to n jobs: one shard from the first of the lanes of shards that has any, the others from the first of the
-- lanes that has any.
--
-- Owners take turns, class by class. Aging: an owner whose jobs of a class have been passed over for as long as
-- their class is worth competes with the class that is being served, and then gets every second turn until it has
-- been served. It is the owner's queue that ages, not each job: of 10,000 jobs in a queue that is being served none
-- is starved, and they shall not overtake the one fresh job of another owner for their age.

local taken_key = prefix .. 'taken:' .. worker
local function answer(id)
  local values = redis.call('HMGET', prefix .. 'job:' .. id, unpack(fields))
  local whole = whole_of(id)
  if whole then -- what a shard has not of its own is its job's
    for i, value in ipairs(redis.call('HMGET', prefix .. 'job:' .. whole, unpack(fields))) do
      values[i] = values[i] or value
    end
  end
  return values
end

-- A shard is begun, and with the first of them its job.
local function begin_whole(id, attempt)
  local whole = load(id)
  if whole.status == 'queued' then
    change_status(whole, 'running')
    write(id, 'status', 'running', 'started_at', now)
    announce(id, 'status', cjson.encode({ status = 'running', attempt = attempt }), 'running')
  end
  local most = tonumber(redis.call('HGET', prefix .. 'job:' .. id, 'shard_attempt') or '0')
  if attempt > most then write(id, 'shard_attempt', attempt) end
end

-- Sent again because the answer was lost: the same jobs are given out, or they would lie until their leases lapse.
local last = redis.call('GET', taken_key)
if last and string.sub(last, 1, #token + 1) == token .. ' ' then
  local reply = { 0 }
  for id in string.gmatch(string.sub(last, #token + 2), '%S+') do
    if held(id, worker, token, '') then reply[#reply + 1] = answer(id) end
  end
  return reply
end

-- -> class, owner, whether it is the turn of one that was passed over
local function next_turn(lane)
  local class, owner
  for candidate = 0, 2 do
    owner = redis.call('ZRANGE', prefix .. 'turns:' .. candidate .. ':' .. lane, 0, 0)[1]
    if owner then
      class = candidate
      break
    end
  end
  if not owner then return nil end
  local late, late_owner, since
  for candidate = class + 1, 2 do
    local oldest = redis.call('ZRANGE', prefix .. 'passed:' .. candidate .. ':' .. lane, 0, 0, 'WITHSCORES')
    local start = tonumber(oldest[2])
    if start and now - start >= (candidate - class) * terms.aging_ms and (not since or start < since) then
      late, late_owner, since = candidate, oldest[1], start
    end
  end
  if late and redis.call('HEXISTS', prefix .. 'aged', lane) == 0 then return late, late_owner, true end
  return class, owner, false
end

local reply, ids, solo_waiting = {}, {}, 0
local function take_from(lane, most)
  while #ids < most do
    local class, owner, late = next_turn(lane)
    if not class then break end
    local queue = prefix .. 'ready:' .. lane .. '|' .. owner
    local id = redis.call('ZRANGEBYSCORE', queue, class * BAND, (class + 1) * BAND - 1, 'LIMIT', 0, 1)[1]
    local job = load(id)
    local alone = job.solo == '1'
    if alone and (not engine_idle or #ids > 0) then
      solo_waiting = 1
      break
    end
    if late then
      redis.call('HSET', prefix .. 'aged', lane, '1')
    else
      redis.call('HDEL', prefix .. 'aged', lane)
    end
    leave_ready(id, job, true)
    leave_lane(job)
    change_status(job, 'running')
    local attempt = tonumber(job.attempt) + 1
    write(id, 'status', 'running', 'state', 'running', 'worker', worker, 'token', token, 'attempt', attempt,
      'alone', job.solo)
    if job.shards == 0 then
      write(id, 'started_at', now, 'progress', '')
    else -- it began with its shards, unless it is replayed and they are done
      redis.call('HSETNX', prefix .. 'job:' .. id, 'started_at', now)
    end
    if job.whole then begin_whole(job.whole, attempt) end
    count_running(job, 1)
    redis.call('ZADD', prefix .. 'leases', now + lease_ms, id)
    announce(id, 'status', cjson.encode({ status = 'running', attempt = attempt }), 'running')
    ids[#ids + 1] = id
    reply[#reply + 1] = answer(id)
    if alone then n, most = 1, 1 end
  end
end

for _, lane in ipairs(shard_lanes) do
  if #ids > 0 or solo_waiting == 1 then break end
  take_from(lane, math.min(n, 1))
end
local shards_taken = #ids
for _, lane in ipairs(lanes) do
  if #ids > shards_taken or solo_waiting == 1 then break end
  take_from(lane, n)
end
if #ids > 0 then
  redis.call('SET', taken_key, token .. ' ' .. table.concat(ids, ' '), 'PX', lease_ms)
end
table.insert(reply, 1, solo_waiting)
return reply
