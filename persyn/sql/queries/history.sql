-- engineer: What happened to this job?
-- Each transition with the worker or person that caused it, and the fence, which increases with each claim.
SELECT at, actor, fence, from_state, to_state, detail
FROM v_events
WHERE job_id = :job
ORDER BY event_id
