-- Hands out the next delivery that is due, for `claim_ms`. Owners take turns, and below an owner its hosts; those that
-- the caller names as full are passed over. A claim that is not settled lapses, and its delivery is handed out again.

local function set(names)
  local known = {}
  for _, name in ipairs(names) do known[name] = true end
  return known
end
local full_owner, full_host = set(full_owners), set(full_hosts)

-- With one more than can be full there is one that is not, when there is any.
local function first_free(key, full, most)
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, most + 1)) do
    if not full[name] then return name end
  end
  return nil
end

for _ = 1, terms.reap_batch do
  local owner = first_free(prefix .. 'hooks', full_owner, #full_owners)
  if not owner then break end
  local host = first_free(prefix .. 'hooks:' .. owner, full_host, #full_hosts)
  if not host then
    redis.call('ZADD', prefix .. 'hooks', 'GT', now + 1, owner) -- its turn came, and it has nothing that may go now
  else
    local queue = prefix .. 'hooks:' .. owner .. '|' .. host
    local id = redis.call('ZRANGEBYSCORE', queue, '-inf', now, 'LIMIT', 0, 1)[1]
    local job = id and load(id)
    if job and job.state == 'ended' then
      local attempt = redis.call('HINCRBY', prefix .. 'job:' .. id, 'hook_attempts', 1)
      write(id, 'hook_token', token, 'hook_next_at', '')
      hook_off(owner, host, id, now + claim_ms, now)
      return { id, owner, host, job.webhook, attempt, redis.call('HGET', prefix .. 'job:' .. id, 'hook_number') }
    end
    hook_off(owner, host, id or '') -- its record is gone: there is nothing left to tell
  end
end
return {}
