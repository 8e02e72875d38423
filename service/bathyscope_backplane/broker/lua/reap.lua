-- Does what time has made due, at most a batch of each: pauses that are over, leases that lapsed, jobs that nobody
-- served, records whose time is over.

local function due(name)
  return redis.call('ZRANGEBYSCORE', prefix .. name, '-inf', now, 'LIMIT', 0, terms.reap_batch)
end
local more = 0
local function full(ids)
  if #ids >= terms.reap_batch then more = 1 end
end

local delayed = due('delayed')
full(delayed)
for _, id in ipairs(delayed) do
  redis.call('ZREM', prefix .. 'delayed', id)
  local job = load(id)
  if job and job.state == 'delayed' then make_ready(id, job) end
end

local lapsed = due('leases')
full(lapsed)
for _, id in ipairs(lapsed) do
  redis.call('ZREM', prefix .. 'leases', id)
  local job = load(id)
  if job and job.state == 'running' then
    take_back(id, job, job.alone == '1', 'lease_lapsed', terms.lapse_problem)
  end
end

-- Whether workers are at shards of a job.
local function being_served(id, job)
  for number = 0, job.shards - 1 do
    if redis.call('HGET', prefix .. 'job:' .. shard_id(id, number), 'state') == 'running' then return true end
  end
  return false
end

local expired, purged = {}, 0
local over = due('expiry')
full(over)
for _, id in ipairs(over) do
  local job = load(id)
  if not job then
    local status, owner = string.match(redis.call('GET', prefix .. 'tomb:' .. id) or '', '^([^|]*)|(.*)$')
    purge(id, owner, status)
    purged = purged + 1
  elseif job.state == 'ended' then
    -- Not when it ended just now, with a parent of this same batch.
    if tonumber(job.expires_at) <= now then
      purge(id, job.owner, job.status)
      purged = purged + 1
    end
  elseif job.state == 'running' or being_served(id, job) then
    redis.call('ZADD', prefix .. 'expiry', now + terms.queue_ttl_ms, id)
  else
    end_job(id, job, 'expired', terms.expiry_problem, { 'reason', 'expired' })
    expired[#expired + 1] = id
  end
end
return { #delayed, lapsed, expired, purged, more }
