-- engineer: Where is this prompt used?
-- All runs that contain it, the teacher that answers it in each, and the students trained on the response. A filter of an export may exclude it.
SELECT run, role, teacher, reason, is_answered, training_id, trained_at
FROM v_uses
WHERE prompt_id = :prompt
ORDER BY run, training_id
