-- operator: How much did each teacher generate, and at what cost?
-- Tokens of all responses that the run uses, whichever run requested them; dollars is null without prices or counts of tokens.
SELECT teacher, assigned, responses, failed, prompt_tokens, response_tokens, dollars
FROM v_teacher_cost
WHERE run = :run
ORDER BY position
