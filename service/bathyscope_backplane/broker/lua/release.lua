-- Puts a leased job back: `drain` does not count, `engine_died_together` has its own bound, `engine_died_alone` is
-- an attempt of the job.

local job, again = held(id, worker, token, 'release')
if not job then return again and 1 or 0 end
write(id, 'settled', 'release ' .. token)
if reason ~= 'drain' then
  take_back(id, job, reason == 'engine_died_alone', reason, terms.death_problem)
elseif job.cancel == '1' then
  end_job(id, job, 'cancelled', terms.cancel_problem, { 'reason', 'cancelled' })
else
  job.attempt = tonumber(job.attempt) - 1
  requeue(id, job, reason)
  make_ready(id, job)
end
return 1
