-- engineer: Where is this prompt used?
-- Every run that has it, who answers it there, and the students that were trained on that answer.
SELECT run, role, teacher, reason, is_in_dataset, training_id, trained_at
FROM v_uses
WHERE prompt_id = :prompt
ORDER BY run, training_id
