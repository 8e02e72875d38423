-- Ends a queued job at once; tells the worker of a running one to stop.

local job = load(id)
if not job then return 'missing' end
if job.status == 'cancelled' then return 'already' end
if job.state == 'ended' then return 'finished' end
if job.state ~= 'running' then
  end_job(id, job, 'cancelled', terms.cancel_problem, { 'cancel', '1', 'reason', 'cancelled' })
  return 'cancelled'
end
if job.cancel ~= '1' then
  write(id, 'cancel', '1')
  announce(id, 'status', cjson.encode({ status = 'running', cancelling = true }), 'cancelling')
end
redis.call('PUBLISH', prefix .. 'stop', id .. ' ' .. job.worker)
return 'cancelling'
