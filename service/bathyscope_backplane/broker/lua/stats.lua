-- Counts everything: [lane, ready, queued, oldest age in ms, solo] of each lane, and the sums. Shards have no age while
-- workers are at others of their lane.

local lanes = {}
local loads = redis.call('HGETALL', prefix .. 'lane_load')
for i = 1, #loads, 2 do
  local lane = loads[i]
  local oldest = redis.call('ZRANGE', prefix .. 'age:' .. lane, 0, 0, 'WITHSCORES')[2]
  local served = redis.call('HEXISTS', prefix .. 'shards_running', lane) == 1
  lanes[#lanes + 1] = {
    lane,
    redis.call('ZCARD', prefix .. 'age:' .. lane),
    tonumber(loads[i + 1]),
    oldest and not served and math.max(0, now - tonumber(oldest)) or 0,
    redis.call('SCARD', prefix .. 'solo:' .. lane),
  }
end
return {
  lanes,
  redis.call('HGETALL', prefix .. 'tally'),
  redis.call('HGETALL', prefix .. 'totals'),
  redis.call('ZCARD', prefix .. 'delayed'),
  redis.call('SCARD', prefix .. 'waiting'),
  redis.call('ZCARD', prefix .. 'leases'),
  redis.call('ZCARD', prefix .. 'dead'),
}
