-- engineer: What does the dataset contain?
-- One row per dataset row, with its origin; v_dataset has more columns.
SELECT prompt_id, source, source_id, teacher, reason, margin, finish_reason, response_tokens, prompt, response
FROM v_dataset
WHERE run = :run
ORDER BY prompt_id
