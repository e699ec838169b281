-- operator: How far is a run?
-- total = done + failed + pending, for each stage that it has come to.
SELECT stage, total, done, failed, pending
FROM v_progress
WHERE run = :run
ORDER BY place
