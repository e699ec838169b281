-- operator: How long did each teacher reason, and how often did it not finish?
-- Means per response that reasons; share is the part of all response tokens. Unfinished responses ended inside their reasoning, and failed.
SELECT teacher, responses, reasoned, unfinished, reasoning_tokens / nullif(CAST(reasoned AS double precision), 0) AS mean_tokens,
       reasoning_tokens / nullif(CAST(response_tokens AS double precision), 0) AS share
FROM v_teacher_cost
WHERE run = :run
ORDER BY position
