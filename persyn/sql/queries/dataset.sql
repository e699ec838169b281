-- engineer: What is in the dataset?
-- Row by row, with where each comes from; v_dataset has more columns.
SELECT prompt_id, source, source_id, teacher, reason, margin, finish_reason, response_tokens, prompt, response
FROM v_dataset
WHERE run = :run
ORDER BY prompt_id
