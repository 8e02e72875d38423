-- Walks the jobs of one owner ('' for all), newest first, from after the id `after` ('' for the start), over at most
-- `scan` of them, until `limit` match.

local list = prefix .. (owner == '' and 'jobs' or 'jobs:' .. owner)
local from = after == '' and '+' or '(' .. after
local found, seen, last = {}, 0, nil
while #found < limit and seen < scan do
  local ids = redis.call('ZRANGE', list, from, '-', 'BYLEX', 'REV', 'LIMIT', 0, math.min(limit, scan - seen))
  if #ids == 0 then
    last = nil
    break
  end
  for _, id in ipairs(ids) do
    local its_kind, its_status = unpack(redis.call('HMGET', prefix .. 'job:' .. id, 'kind', 'status'))
    if its_kind and (kind == '' or its_kind == kind) and (status == '' or its_status == status) then
      found[#found + 1] = redis.call('HMGET', prefix .. 'job:' .. id, unpack(fields))
    end
    seen, last = seen + 1, id
    if #found >= limit then break end
  end
  from = '(' .. last
end
if last and #redis.call('ZRANGE', list, '(' .. last, '-', 'BYLEX', 'REV', 'LIMIT', 0, 1) == 0 then last = nil end
table.insert(found, 1, last or '')
return found
