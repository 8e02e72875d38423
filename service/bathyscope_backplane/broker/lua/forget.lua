-- Removes the record of an ended job; its tombstone stays.

local job = load(id)
if not job then return 0 end
if job.state ~= 'ended' then return -1 end
purge(id, job.owner, job.status)
return 1
