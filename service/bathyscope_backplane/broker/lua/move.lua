-- Hands a running job over to another lane for the next part of its work: what it needs there replaces its payload. The
-- attempt goes on: it counts once for both parts. Its secret was for the part that is done, and is erased; blame for an
-- engine's death stays behind, for another engine does the rest.

local job, again = held(id, worker, token, 'move')
if not job then return again and 1 or 0 end
write(id, 'settled', 'move ' .. token)
if job.cancel == '1' then
  end_job(id, job, 'cancelled', terms.cancel_problem, { 'reason', 'cancelled' })
  return 1
end
redis.call('HDEL', prefix .. 'job:' .. id, 'secret', 'credentials')
job.attempt, job.lane, job.solo = tonumber(job.attempt) - 1, lane, '0'
write(id, 'lane', lane, 'payload', payload, 'solo', '0', 'progress', '')
requeue(id, job, 'moved')
make_ready(id, job)
return 1
