-- researcher: Where was the router least sure?
-- The 20 smallest margins: log-odds that the chosen teacher is rewarded more than the next.
SELECT a.prompt_id, t.name AS teacher, a.margin, p.text AS prompt
FROM assignments a
JOIN runs r ON r.id = a.run_id
JOIN teachers t ON t.id = a.teacher_id
JOIN prompts p ON p.id = a.prompt_id
WHERE r.name = :run AND a.reason = 'router' AND a.margin IS NOT NULL
ORDER BY a.margin, a.prompt_id
LIMIT 20
