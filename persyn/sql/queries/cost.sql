-- operator: What did each teacher write, and what did that cost?
-- Tokens of the responses that the run rests on, whichever run asked for them; dollars is null without a price or a count.
SELECT teacher, assigned, responses, failed, prompt_tokens, response_tokens, dollars
FROM v_teacher_cost
WHERE run = :run
ORDER BY position
