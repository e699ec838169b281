-- operator: Which jobs were attempted more than once, and why?
-- claims is the number of attempts; error is the last failure.
SELECT job_id, stage, teacher, scorer, state, fence AS claims, attempts, error
FROM v_jobs
WHERE run = :run AND (fence > 1 OR error IS NOT NULL)
ORDER BY fence DESC, job_id
