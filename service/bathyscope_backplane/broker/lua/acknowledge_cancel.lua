-- The worker has stopped a job that was to be cancelled.

local job, again = held(id, worker, token, 'acknowledge_cancel')
if not job then return again and 1 or 0 end
end_job(id, job, 'cancelled', terms.cancel_problem,
  { 'cancel', '1', 'reason', 'cancelled', 'settled', 'acknowledge_cancel ' .. token })
return 1
