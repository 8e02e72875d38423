-- Puts a leased job back: `drain` and `elsewhere` do not count; of a death or hang of the engine, `…_together` has
-- its own bound and `…_alone` is an attempt of the job.

local ENGINE = {
  engine_died_alone = terms.death_problem,
  engine_died_together = terms.death_problem,
  engine_hung_alone = terms.hang_problem,
  engine_hung_together = terms.hang_problem,
}

local job, again = held(id, worker, token, 'release')
if not job then return again and 1 or 0 end
write(id, 'settled', 'release ' .. token)
if ENGINE[reason] then
  take_back(id, job, string.sub(reason, -6) == '_alone', reason, ENGINE[reason])
elseif job.cancel == '1' then
  end_job(id, job, 'cancelled', terms.cancel_problem, { 'reason', 'cancelled' })
else
  job.attempt = tonumber(job.attempt) - 1
  requeue(id, job, reason)
  make_ready(id, job)
end
return 1
