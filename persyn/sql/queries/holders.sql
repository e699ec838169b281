-- operator: Who is working on what, right now?
-- Of all runs. A worker that is gone stays here until the sweep takes its jobs back.
SELECT worker, run, stage, teacher, scorer, job_id, n_prompts, started_at
FROM v_jobs
WHERE state = 'running'
ORDER BY worker, job_id
