-- researcher: Which assignments did the router decide by the smallest margins?
-- The 20 smallest margins: log-odds that the chosen teacher has a higher reward than the runner-up.
SELECT a.prompt_id, t.name AS teacher, a.margin, p.text AS prompt
FROM assignments a
JOIN runs r ON r.id = a.run_id
JOIN teachers t ON t.id = a.teacher_id
JOIN prompts p ON p.id = a.prompt_id
WHERE r.name = :run AND a.reason LIKE 'router%' AND a.margin IS NOT NULL
ORDER BY a.margin, a.prompt_id
LIMIT 20
