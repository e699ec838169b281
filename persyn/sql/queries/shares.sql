-- engineer: How many prompts did each teacher receive, and why?
-- mean_margin is the mean margin over the runner-up: in router scores if the reason is router, in rewards if it is calibration.
SELECT t.name AS teacher, a.reason, count(*) AS prompts, avg(a.margin) AS mean_margin
FROM assignments a
JOIN runs r ON r.id = a.run_id
JOIN teachers t ON t.id = a.teacher_id
WHERE r.name = :run
GROUP BY t.name, a.reason
ORDER BY prompts DESC, teacher
