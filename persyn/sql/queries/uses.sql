-- engineer: Where is this prompt used?
-- Every run that has it, who answers it there, and the students trained on it. A filter of an export may leave it out.
SELECT run, role, teacher, reason, is_answered, training_id, trained_at
FROM v_uses
WHERE prompt_id = :prompt
ORDER BY run, training_id
