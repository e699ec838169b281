-- researcher: What became of the students?
-- Mean score of its responses; run is null for the student before any training.
SELECT student, run, training_id, prompts_file, scorer, prompts, judged, failed, mean
FROM v_evaluations
ORDER BY student, prompts_file, scorer, training_id NULLS FIRST, evaluation_id
