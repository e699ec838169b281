-- operator: Which workers hold which jobs now?
-- All runs. A dead worker is listed until the sweep reclaims its jobs.
SELECT worker, run, stage, teacher, scorer, job_id, n_prompts, started_at
FROM v_jobs
WHERE state = 'running'
ORDER BY worker, job_id
