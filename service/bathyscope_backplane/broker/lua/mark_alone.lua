-- Notes whether a job runs alone in its engine, so that a lapse of its lease is judged rightly.

if not held(id, worker, token, '') then return 0 end
write(id, 'alone', alone and '1' or '0')
return 1
