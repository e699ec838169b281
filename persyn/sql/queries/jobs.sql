-- operator: What state are the jobs in?
-- n_prompts is the number of prompts at planning time; seconds is the sum of the times from claim to end.
SELECT stage, state, count(*) AS jobs, sum(n_prompts) AS n_prompts, sum(seconds) AS seconds
FROM v_jobs
WHERE run = :run
GROUP BY stage, state
ORDER BY min(job_id)
