-- The scripts of RedisTracker. All their keys have one hash tag, and so are on one node of a cluster.


-- write: replaces or removes one record, with its indexes, if the stored version still is the expected one.
-- KEYS = the task, its status before, its status after, ready, scheduled.
-- ARGV = the expected version (empty: nothing is stored), the new version, the new record (empty: remove), the id,
--       the member to remove from ready, the one to add and its score, the time in scheduled (empty: none of these).
-- Gives 1, or the stored record.
local stored = redis.call('HGET', KEYS[1], 'version')
if stored == ARGV[2] then
  -- This very write, sent once more after its reply was lost. It is written again, so that a WAIT covers it.
  redis.call('HSET', KEYS[1], 'version', stored)
  return 1
end
if (stored or '') ~= ARGV[1] then
  return redis.call('HGET', KEYS[1], 'record')
end
-- What needs memory comes first: where there is none, nothing is changed.
if ARGV[3] == '' then
  redis.call('DEL', KEYS[1])
  redis.call('ZREM', KEYS[2], ARGV[4])
else
  redis.call('HSET', KEYS[1], 'version', ARGV[2], 'record', ARGV[3])
  redis.call('ZADD', KEYS[3], 0, ARGV[4])
  if KEYS[2] ~= KEYS[3] then
    redis.call('ZREM', KEYS[2], ARGV[4])
  end
end
if ARGV[5] ~= '' then
  redis.call('ZREM', KEYS[4], ARGV[5])
end
if ARGV[6] ~= '' then
  redis.call('ZADD', KEYS[4], ARGV[7], ARGV[6])
end
if ARGV[8] ~= '' then
  redis.call('ZADD', KEYS[5], ARGV[8], ARGV[4])
else
  redis.call('ZREM', KEYS[5], ARGV[4])
end
return 1


-- page: the next ids of each of some statuses, all of one moment, so that a task that changes is not missed.
-- KEYS = the statuses; ARGV = from where and up to where, as ZRANGEBYLEX takes them, and how many of each.
local pages = {}
for i, key in ipairs(KEYS) do
  pages[i] = redis.call('ZRANGEBYLEX', key, ARGV[1], ARGV[2], 'LIMIT', 0, ARGV[3])
end
return pages


-- count: how many tasks each of some statuses has, all of one moment.
-- KEYS = the statuses.
local counts = {}
for i, key in ipairs(KEYS) do
  counts[i] = redis.call('ZCARD', key)
end
return counts


-- claimable: what may be worth a claim, and when more will be, all of one moment.
-- KEYS = ready, scheduled; ARGV = the time, how many.
-- Gives members of ready, ids of scheduled that are due, and the first id that is not, with its time.
return {
  redis.call('ZRANGE', KEYS[1], 0, ARGV[2] - 1),
  redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[2]),
  redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, 1),
}
