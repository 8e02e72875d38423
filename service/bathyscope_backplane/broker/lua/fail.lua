-- Ends an attempt: another one after a pause that doubles, or the end.

local job, again = held(id, worker, token, 'fail')
if not job then return again and 1 or 0 end
write(id, 'settled', 'fail ' .. token)
local attempt = tonumber(job.attempt)
if job.cancel == '1' then
  end_job(id, job, 'cancelled', terms.cancel_problem, { 'reason', 'cancelled' })
elseif not retry then
  end_job(id, job, 'failed', problem, { 'reason', 'failed' })
elseif attempt >= tonumber(job.max_attempts) then
  bury(id, job, problem, 'attempts_spent')
else
  local pause = math.min(terms.backoff_cap_ms, terms.backoff_base_ms * 2 ^ (attempt - 1))
  requeue(id, job, 'retry')
  write(id, 'state', 'delayed', 'error', problem)
  redis.call('ZADD', prefix .. 'delayed', now + math.floor(pause * (0.5 + jitter / 2)), id)
end
return 1
