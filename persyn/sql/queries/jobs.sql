-- operator: Where do the jobs stand?
-- n_prompts is what they held when they were planned; seconds are those between claim and end, added up.
SELECT stage, state, count(*) AS jobs, sum(n_prompts) AS n_prompts, sum(seconds) AS seconds
FROM v_jobs
WHERE run = :run
GROUP BY stage, state
ORDER BY min(job_id)
