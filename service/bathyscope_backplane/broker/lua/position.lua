-- Estimates how many jobs go before a ready one: its owner's earlier ones, all of better classes, and of each other
-- owner in the ring as many as turns come round before. Rings longer than `sample` are extrapolated.

local job = load(id)
if job and job.state == 'split' then
  id = shard_id(id, 0)
  job = load(id)
end
if not job or job.state ~= 'ready' then return -1 end

local function size(owner, class)
  return redis.call('ZCOUNT', prefix .. 'ready:' .. job.lane .. '|' .. owner, class * BAND, (class + 1) * BAND - 1)
end
local function ring(class)
  local key = prefix .. 'turns:' .. class .. ':' .. job.lane
  local owners = redis.call('ZRANGE', key, 0, sample - 1)
  return owners, #owners > 0 and redis.call('ZCARD', key) / #owners or 1
end

local before = 0
for class = 0, job.class - 1 do
  local sum, owners, scale = 0, ring(class)
  for _, owner in ipairs(owners) do sum = sum + size(owner, class) end
  before = before + sum * scale
end
local score = redis.call('ZSCORE', queue_of(job), id)
local own = redis.call('ZCOUNT', queue_of(job), job.class * BAND, '(' .. score)
local turns = prefix .. 'turns:' .. job.class .. ':' .. job.lane
local turn = tonumber(redis.call('ZSCORE', turns, job.owner))
local sum, owners, scale = 0, ring(job.class)
for _, owner in ipairs(owners) do
  if owner ~= job.owner then
    local earlier = tonumber(redis.call('ZSCORE', turns, owner)) < turn
    sum = sum + math.min(size(owner, job.class), own + (earlier and 1 or 0))
  end
end
return math.floor(before + own + sum * scale)
