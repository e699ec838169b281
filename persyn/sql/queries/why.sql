-- researcher: Why this teacher?
-- A target went by the router's scores; a prompt of the grid by its rewards, which v_reward_matrix has.
SELECT teacher, router_score, router_rank, quality, learnability, is_chosen, reason, margin
FROM v_why_teacher
WHERE run = :run AND prompt_id = :prompt
ORDER BY is_chosen DESC, router_rank, position
