-- operator: What is still missing?
-- By stage, teacher and scorer; no rows if nothing is missing.
SELECT stage, teacher, scorer, count(*) AS missing, min(prompt_id) AS first_prompt_id
FROM v_missing
WHERE run = :run
GROUP BY place, stage, teacher, scorer
ORDER BY place, missing DESC, teacher, scorer
