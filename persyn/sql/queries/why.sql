-- researcher: Why was this teacher chosen?
-- For a target prompt the router scores decided; for a calibration prompt the rewards, which v_reward_matrix lists.
SELECT teacher, router_score, router_rank, quality, learnability, is_chosen, reason, margin
FROM v_why_teacher
WHERE run = :run AND prompt_id = :prompt
ORDER BY is_chosen DESC, router_rank, position
