-- operator: What is the progress of a run?
-- total = done + failed + pending, for each stage reached.
SELECT stage, total, done, failed, pending
FROM v_progress
WHERE run = :run
ORDER BY place
