-- operator: How much time was spent on loading models?
-- Queue affinity reduces it; gpus is null for a model that needs none.
SELECT j.queue, l.gpus, count(*) AS loads, count(DISTINCT l.owner) AS workers, sum(l.seconds) AS seconds,
       max(l.seconds) AS longest
FROM loads l
JOIN jobs j ON j.id = l.job_id
JOIN runs r ON r.id = l.run_id
WHERE r.name = :run
GROUP BY j.queue, l.gpus
ORDER BY seconds DESC
