-- What the scripts share: the clock, the keys, and the moves of a job between its states.
--
-- Keys, all below `prefix`:
--   job:<id>            hash, the truth about one job; of a shard '<id>+<number>', which is in no list and has no
--                       events, and whose payload is that of the whole
--   events:<id>         stream, capped; goes with the job
--   children:<id>       set, jobs that wait for this one; gone once it has ended
--   tomb:<id>           '<status>|<owner>', outlives the job
--   idem:<key>          '<body hash>|<job>'
--   ready:<lane>|<owner>   sorted set of jobs: class * BAND + sequence
--   turns:<class>:<lane>   sorted set of owners with ready jobs of that class: number of their last turn
--   passed:<class>:<lane>  the same owners: since when they have been passed over (classes 1 and 2)
--   age:<lane>          sorted set of ready jobs: since when
--   solo:<lane>         set of ready jobs that must run alone
--   aged                hash of lanes whose last turn went to an owner that had been passed over
--   leases, delayed, expiry, dead   sorted sets of jobs: when they are due
--   hooks:<owner>|<host>   sorted set of ended jobs whose webhook is to be told: when it is due, or its claim lapses
--   hooks:<owner>, hooks   sorted sets of those hosts, and of the owners: when they are due, later once served
--   waiting             set of jobs with unmet parents
--   jobs, jobs:<owner>  sorted sets of ids, all of score 0: the order of ids is the order of making
--   lane_load           hash: queued jobs of a lane; its fields are the lanes in use
--   shards_running      hash: shards of a lane that workers hold
--   owner_load, owner_bytes   hashes: unfinished jobs of an owner, and what their results may take
--   inputs:<owner>:<day>   inputs that an owner asked for on a day, UTC
--   tally, totals       hashes: jobs by status now; jobs ever ended by '<kind>|<status>', put back by '|<reason>'
--   sequence            counter of turns and of submissions

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000) + skew_ms

local CLASS = { high = 0, normal = 1, low = 2 }
local BAND = 2 ^ 50 -- a class is worth more than any sequence; both together stay exact in a double

local FIELDS = {
  'status', 'state', 'kind', 'lane', 'owner', 'priority', 'worker', 'token', 'attempt', 'max_attempts',
  'group_deaths', 'solo', 'alone', 'parents', 'cancel', 'settled', 'sequence', 'expires_at', 'error',
  'webhook', 'bytes', 'shards', 'rows', 'done',
}

-- The job that a shard is a part of, or nil.
local function whole_of(id)
  return string.match(id, '^(.+)%+%d+$')
end

local function shard_id(id, number)
  return id .. '+' .. number
end

-- The job's hash as a table, or nil.
local function load(id)
  local values = redis.call('HMGET', prefix .. 'job:' .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {}
  for i, name in ipairs(FIELDS) do job[name] = values[i] end
  job.class = CLASS[job.priority]
  job.whole = whole_of(id)
  job.shards = tonumber(job.shards or '0')
  return job
end

local function write(id, ...)
  redis.call('HSET', prefix .. 'job:' .. id, ...)
end

-- The job when this attempt holds it. Else nil, and whether this very attempt did this very deed before: the
-- answer to it was lost and the client's connection sent it again.
local function held(id, worker, token, deed)
  local job = load(id)
  if job and job.status == 'running' and job.worker == worker and job.token == token then return job, false end
  return nil, job ~= nil and job.settled == deed .. ' ' .. token
end

local DAY_MS = 86400000

local function inputs_key(owner)
  return prefix .. 'inputs:' .. owner .. ':' .. math.floor(now / DAY_MS)
end

local function add(hash, field, by)
  if redis.call('HINCRBY', prefix .. hash, field, by) <= 0 then redis.call('HDEL', prefix .. hash, field) end
end

local function announce(id, kind, data, word)
  if whole_of(id) then return end
  redis.call('XADD', prefix .. 'events:' .. id, 'MAXLEN', '~', terms.events_kept, '*', 'type', kind, 'data', data)
  redis.call('PUBLISH', prefix .. 'job', id .. ' ' .. word)
end

local function next_number()
  return redis.call('INCR', prefix .. 'sequence')
end

local function queue_of(job)
  return prefix .. 'ready:' .. job.lane .. '|' .. job.owner
end

-- Owners are in the ring of a class exactly as long as they have ready jobs of it. A new one begins at the end:
-- it waits for one job of each other at most, and nobody gains by leaving and coming back.
local function make_ready(id, job)
  local turns = prefix .. 'turns:' .. job.class .. ':' .. job.lane
  if not redis.call('ZSCORE', turns, job.owner) then
    redis.call('ZADD', turns, next_number(), job.owner)
    if job.class > 0 then
      redis.call('ZADD', prefix .. 'passed:' .. job.class .. ':' .. job.lane, now, job.owner)
    end
  end
  -- The sequence is that of the submission, so what is put back goes before what came later.
  redis.call('ZADD', queue_of(job), job.class * BAND + tonumber(job.sequence), id)
  redis.call('ZADD', prefix .. 'age:' .. job.lane, now, id)
  if job.solo == '1' then redis.call('SADD', prefix .. 'solo:' .. job.lane, id) end
  write(id, 'state', 'ready', 'enqueued_at', now)
  redis.call('PUBLISH', prefix .. 'bell', job.lane)
end

-- `served` is true for a take: the owner's turn is over and it has not been passed over.
local function leave_ready(id, job, served)
  local queue = queue_of(job)
  local turns = prefix .. 'turns:' .. job.class .. ':' .. job.lane
  local passed = prefix .. 'passed:' .. job.class .. ':' .. job.lane
  redis.call('ZREM', queue, id)
  if redis.call('ZCOUNT', queue, job.class * BAND, (job.class + 1) * BAND - 1) == 0 then
    redis.call('ZREM', turns, job.owner)
    redis.call('ZREM', passed, job.owner)
  elseif served then
    redis.call('ZADD', turns, next_number(), job.owner)
    if job.class > 0 then redis.call('ZADD', passed, now, job.owner) end
  end
  redis.call('ZREM', prefix .. 'age:' .. job.lane, id)
  if job.solo == '1' then redis.call('SREM', prefix .. 'solo:' .. job.lane, id) end
end

local function leave_lane(job)
  add('lane_load', job.lane, -1)
  if redis.call('EXISTS', prefix .. 'age:' .. job.lane) == 0 then redis.call('HDEL', prefix .. 'aged', job.lane) end
end

local function change_status(job, status)
  if not job.whole then
    add('tally', job.status, -1)
    add('tally', status, 1)
  end
  job.status = status
end

-- A shard comes to be held by a worker, or is not any more.
local function count_running(job, by)
  if job.whole then add('shards_running', job.lane, by) end
end

-- How far a shard is, in rows; what the whole shows is the sum.
local function shard_done(id, job, done)
  local record, by = prefix .. 'job:' .. job.whole, done - tonumber(job.done or '0')
  local state, rows = unpack(redis.call('HMGET', record, 'state', 'rows'))
  if by == 0 or state ~= 'split' then return end
  write(id, 'done', done)
  job.done = done
  local sum = redis.call('HINCRBY', record, 'done', by)
  local progress = cjson.encode({ stage = 'forward', done = sum, total = tonumber(rows), unit = 'inputs' })
  write(job.whole, 'progress', progress)
  announce(job.whole, 'progress', progress, 'progress')
end

-- From running back to queued; the caller says into which state.
local function requeue(id, job, reason)
  redis.call('ZREM', prefix .. 'leases', id)
  count_running(job, -1)
  if job.whole then shard_done(id, job, 0) end
  change_status(job, 'queued')
  add('totals', '|' .. reason, 1)
  add('lane_load', job.lane, 1)
  write(id, 'status', 'queued', 'reason', reason, 'alone', '0', 'attempt', job.attempt)
  announce(id, 'status', cjson.encode({ status = 'queued', attempt = tonumber(job.attempt), reason = reason }), 'queued')
end

local function ancestors(job)
  local ids = {}
  for parent in string.gmatch(job.parents or '', '%S+') do ids[#ids + 1] = parent end
  return ids
end

-- The problem of a job whose parent did not succeed. `cause` is the parent's own problem, or nil; down a chain of
-- jobs the first cause is handed on as it is, so that the thousandth still says what went wrong, and no more.
local function dependency_problem(parent, status, cause)
  local problem = cjson.decode(terms.dependency_problem)
  local detail = 'The job ' .. parent .. ', which this one needs, ' .. status .. '.'
  local ok, document = pcall(cjson.decode, cause or '')
  if ok and type(document) == 'table' then
    local first = type(document.cause) == 'table' and document.cause or document
    problem.cause = { type = first.type, title = first.title, status = first.status, detail = first.detail }
    -- An empty list would be encoded as an object.
    if type(first.errors) == 'table' and #first.errors > 0 then problem.cause.errors = first.errors end
    if type(first.detail) == 'string' then detail = detail .. ' ' .. first.detail end
  end
  problem.parent = parent
  problem.detail = detail
  return cjson.encode(problem)
end

-- Ends a shard: nothing is left but its hash, for its job may be replayed.
local function settle_shard(id, job, status, error, extra)
  change_status(job, status)
  write(id, 'status', status, 'state', 'ended', 'finished_at', now, 'alone', '0', 'error', error, unpack(extra or {}))
  if status == 'succeeded' then shard_done(id, job, tonumber(job.rows)) end
  job.state, job.error = 'ended', error
end

local HOW = { failed = 'failed', cancelled = 'was cancelled', expired = 'was not served in time' }

-- The host of a webhook, without its port: the unit of fairness below an owner.
local function hook_host(url)
  local authority = string.lower(string.match(url, '^%a+://([^/?#]*)') or '')
  return (string.gsub(authority, ':%d+$', ''))
end

-- A delivery comes to be due. Owner and host keep the turn that they have.
local function hook_due(owner, host, id, due)
  redis.call('ZADD', prefix .. 'hooks:' .. owner .. '|' .. host, due, id)
  redis.call('ZADD', prefix .. 'hooks:' .. owner, 'LT', due, host)
  redis.call('ZADD', prefix .. 'hooks', 'LT', due, owner)
end

-- A delivery is put off, or taken out when `due` is nil. Host and owner are due with the first of what they still
-- have, and not before `served`, so that those who had their turn go behind those who wait for theirs.
local function hook_off(owner, host, id, due, served)
  local hosts = prefix .. 'hooks:' .. owner
  local queue = hosts .. '|' .. host
  if due then redis.call('ZADD', queue, due, id) else redis.call('ZREM', queue, id) end
  local function follow(key, name, head)
    if head then
      redis.call('ZADD', key, 'GT', math.max(tonumber(head), served or 0), name)
    else
      redis.call('ZREM', key, name)
    end
  end
  follow(hosts, host, redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')[2])
  follow(prefix .. 'hooks', owner, redis.call('ZRANGE', hosts, 0, 0, 'WITHSCORES')[2])
end

-- Ends one job, wherever it is; returns the children that waited for it.
local function settle(id, job, status, error, extra)
  if job.state == 'ready' then
    leave_ready(id, job, false)
  elseif job.state == 'delayed' then
    redis.call('ZREM', prefix .. 'delayed', id)
  elseif job.state == 'waiting' then
    redis.call('SREM', prefix .. 'waiting', id)
    for _, parent in ipairs(ancestors(job)) do redis.call('SREM', prefix .. 'children:' .. parent, id) end
  elseif job.state == 'running' then
    redis.call('ZREM', prefix .. 'leases', id)
    count_running(job, -1)
  end
  if job.state ~= 'running' then leave_lane(job) end
  if job.whole then
    settle_shard(id, job, status, error, extra)
    return {}
  end
  for number = 0, job.shards - 1 do
    redis.call('PEXPIRE', prefix .. 'job:' .. shard_id(id, number), terms.result_ttl_ms)
  end
  add('owner_load', job.owner, -1)
  if job.bytes then add('owner_bytes', job.owner, -tonumber(job.bytes)) end
  change_status(job, status)
  add('totals', job.kind .. '|' .. status, 1)
  local record, expires_at = prefix .. 'job:' .. id, now + terms.result_ttl_ms
  write(id, 'status', status, 'state', 'ended', 'finished_at', now, 'expires_at', expires_at, 'alone', '0',
    'error', error, unpack(extra or {}))
  -- A dead letter is replayed from its payload; nobody else needs it again, and secrets go in any case.
  redis.call('HDEL', record, 'secret', status ~= 'failed' and 'payload' or 'secret')
  redis.call('PEXPIRE', record, terms.result_ttl_ms)
  redis.call('ZADD', prefix .. 'expiry', expires_at, id)
  redis.call('SET', prefix .. 'tomb:' .. id, status .. '|' .. job.owner,
    'PX', terms.result_ttl_ms + terms.tombstone_ttl_ms)
  announce(id, 'done', cjson.encode({ status = status }), status)
  redis.call('PEXPIRE', prefix .. 'events:' .. id, terms.result_ttl_ms)
  if job.webhook then
    redis.call('HINCRBY', record, 'hook_number', 1)
    write(id, 'hook_state', 'pending', 'hook_attempts', '0', 'hook_next_at', now)
    hook_due(job.owner, hook_host(job.webhook), id, now)
  end
  job.state, job.error = 'ended', error
  local children = redis.call('SMEMBERS', prefix .. 'children:' .. id)
  redis.call('DEL', prefix .. 'children:' .. id)
  return children
end

-- What the end of a shard does to its job -> what else is to be ended.
local function follow_shard(job, status, error, extra)
  local whole = load(job.whole)
  if not whole or whole.state ~= 'split' then return {} end
  if status ~= 'succeeded' then return { { job.whole, whole, status, error, extra } } end
  if redis.call('HINCRBY', prefix .. 'job:' .. job.whole, 'unmet', -1) <= 0 then make_ready(job.whole, whole) end
  return {}
end

-- What the end of a job does to its shards -> those that can be ended at once; workers are asked to stop the others.
local function stop_shards(id, job)
  local waiting = {}
  for number = 0, job.shards - 1 do
    local part = shard_id(id, number)
    local shard = load(part)
    if shard and shard.state == 'running' then
      write(part, 'cancel', '1')
      redis.call('PUBLISH', prefix .. 'stop', part .. ' ' .. shard.worker)
    elseif shard and shard.state ~= 'ended' then
      waiting[#waiting + 1] = { part, shard, 'cancelled', terms.cancel_problem, { 'reason', 'cancelled' } }
    end
  end
  return waiting
end

-- Ends a job and does to its descendants what follows from it. Breadth first with a list of its own: a chain of
-- jobs may be longer than Lua's stack is deep.
local function end_job(id, job, status, error, extra)
  local work = { { id, job, status, error, extra } }
  local at = 1
  while work[at] do
    local parent, its, how, why, more = unpack(work[at], 1, 5)
    for _, child in ipairs(settle(parent, its, how, why, more)) do
      local waiting = load(child)
      if waiting and waiting.state == 'waiting' then
        if how ~= 'succeeded' then
          work[#work + 1] = { child, waiting, 'failed', dependency_problem(parent, HOW[how], why), { 'reason', 'dependency_failed' } }
        elseif redis.call('HINCRBY', prefix .. 'job:' .. child, 'unmet', -1) <= 0 then
          redis.call('SREM', prefix .. 'waiting', child)
          make_ready(child, waiting)
        end
      end
    end
    for _, other in ipairs(its.whole and follow_shard(its, how, why, more) or stop_shards(parent, its)) do
      work[#work + 1] = other
    end
    repeat at = at + 1 -- two parents of one child may have ended in this pass: it ends once
    until not work[at] or load(work[at][1]).state ~= 'ended'
  end
end

-- Ends a job that ran out of what it was allowed; it can be replayed.
local function bury(id, job, error, reason)
  redis.call('ZADD', prefix .. 'dead', now, job.whole or id)
  end_job(id, job, 'failed', error, { 'reason', reason, 'dead_letter', '1' })
end

-- A job whose engine died, or whose worker was lost. Only a death while it ran alone is its own attempt; else it is
-- tried alone from now on, and how often that may happen has a bound of its own.
local function take_back(id, job, alone, reason, problem)
  if job.cancel == '1' then
    end_job(id, job, 'cancelled', terms.cancel_problem, { 'reason', 'cancelled' })
    return
  end
  job.solo = '1'
  local spent
  if alone then
    spent = tonumber(job.attempt) >= tonumber(job.max_attempts)
  else
    job.group_deaths = tonumber(job.group_deaths) + 1
    spent = job.group_deaths > terms.max_group_deaths
    if not spent then job.attempt = tonumber(job.attempt) - 1 end
  end
  write(id, 'solo', '1', 'group_deaths', job.group_deaths, 'error', problem)
  if spent then
    bury(id, job, problem, reason)
  else
    requeue(id, job, reason)
    make_ready(id, job)
  end
end

-- Removes all that is left of an ended job but its tombstone.
local function purge(id, owner, status)
  local webhook = owner and redis.call('HGET', prefix .. 'job:' .. id, 'webhook')
  if webhook then hook_off(owner, hook_host(webhook), id) end
  for number = 0, tonumber(redis.call('HGET', prefix .. 'job:' .. id, 'shards') or '0') - 1 do
    local part = shard_id(id, number)
    local shard = load(part)
    if shard and shard.state == 'running' then -- it was told to stop and has not said so yet
      redis.call('ZREM', prefix .. 'leases', part)
      count_running(shard, -1)
    end
    redis.call('DEL', prefix .. 'job:' .. part)
  end
  redis.call('DEL', prefix .. 'job:' .. id, prefix .. 'events:' .. id, prefix .. 'children:' .. id)
  redis.call('ZREM', prefix .. 'expiry', id)
  redis.call('ZREM', prefix .. 'dead', id)
  redis.call('ZREM', prefix .. 'jobs', id)
  if owner then
    redis.call('ZREM', prefix .. 'jobs:' .. owner, id)
    add('tally', status, -1)
  end
end
