-- Puts a leased job back for a later attempt: what it lacked, room on a disk or the store, is not its own fault, so the
-- attempt does not count. The pause doubles each time; a job that nobody could serve expires like any other.

local job, again = held(id, worker, token, 'postpone')
if not job then return again and 1 or 0 end
write(id, 'settled', 'postpone ' .. token)
if job.cancel == '1' then
  end_job(id, job, 'cancelled', terms.cancel_problem, { 'reason', 'cancelled' })
  return 1
end
local times = redis.call('HINCRBY', prefix .. 'job:' .. id, 'postponed', 1)
local pause = math.min(terms.backoff_cap_ms, terms.backoff_base_ms * 2 ^ math.min(times - 1, 30))
job.attempt = tonumber(job.attempt) - 1
requeue(id, job, 'postponed')
write(id, 'state', 'delayed', 'error', problem)
redis.call('ZADD', prefix .. 'delayed', now + math.floor(pause * (0.5 + jitter / 2)), id)
return 1
