-- engineer: Which files do the prompts of a run come from?
-- In the order of the prompts in the run.
SELECT p.source, rp.role, count(*) AS prompts, count(p.answer) AS with_answer
FROM run_prompts rp
JOIN runs r ON r.id = rp.run_id
JOIN prompts p ON p.id = rp.prompt_id
WHERE r.name = :run
GROUP BY p.source, rp.role
ORDER BY p.source, rp.role
