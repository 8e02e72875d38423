-- Stores and announces how far a running job is.

local job = held(id, worker, token, '')
if not job then return 0 end
if job.whole then
  local its = cjson.decode(progress)
  if its.stage ~= 'tokenise' and type(its.total) == 'number' and its.total > 0 then
    shard_done(id, job, math.floor(math.min(1, its.done / its.total) * tonumber(job.rows)))
  end
  return 1
end
write(id, 'progress', progress)
announce(id, 'progress', progress, 'progress')
return 1
