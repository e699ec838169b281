-- researcher: How good are the trained students?
-- Mean score of the student's responses; run is null for the student before training.
SELECT student, run, training_id, prompts_file, scorer, prompts, judged, failed, mean
FROM v_evaluations
ORDER BY student, prompts_file, scorer, training_id NULLS FIRST, evaluation_id
