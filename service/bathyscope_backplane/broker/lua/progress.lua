-- Stores and announces how far a running job is.

if not held(id, worker, token, '') then return 0 end
write(id, 'progress', progress)
announce(id, 'progress', progress, 'progress')
return 1
