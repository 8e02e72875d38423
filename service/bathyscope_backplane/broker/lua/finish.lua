-- Ends a job as succeeded and frees the jobs that waited for it. It stands even when a cancel came meanwhile.

local job, again = held(id, worker, token, 'finish')
if not job then return again and 1 or 0 end
end_job(id, job, 'succeeded', '', { 'resource', resource, 'timings', timings, 'settled', 'finish ' .. token })
return 1
