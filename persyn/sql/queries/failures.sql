-- operator: What failed, and how?
-- A failed row is finished, and is not tried again. A failure of the grid that is also assigned counts in both stages.
SELECT stage, teacher, scorer, reason, count(*) AS failures, min(failure) AS example
FROM v_failures
WHERE run = :run
GROUP BY place, stage, teacher, scorer, reason
ORDER BY failures DESC, place, teacher, reason
