-- engineer: How many prompts has each teacher, and why?
-- mean_margin is by how much it won: of router scores where the reason is router, of rewards where it is calibration.
SELECT t.name AS teacher, a.reason, count(*) AS prompts, avg(a.margin) AS mean_margin
FROM assignments a
JOIN runs r ON r.id = a.run_id
JOIN teachers t ON t.id = a.teacher_id
WHERE r.name = :run
GROUP BY t.name, a.reason
ORDER BY prompts DESC, teacher
