-- operator: Which rows failed, and why?
-- A failed row is final and is not retried. A failed calibration response that is also assigned counts in both stages.
SELECT stage, teacher, scorer, reason, count(*) AS failures, min(failure) AS example
FROM v_failures
WHERE run = :run
GROUP BY place, stage, teacher, scorer, reason
ORDER BY failures DESC, place, teacher, reason
