-- researcher: How good is each teacher on the calibration grid?
-- Raw means (quality in the scorer's unit, learnability in nats), the mean reward, and the number of prompts on which it is best.
SELECT teacher, count(*) AS responses, avg(quality) AS quality, avg(learnability) AS learnability,
       avg(reward) AS reward, sum(CASE WHEN reward = best THEN 1 ELSE 0 END) AS best_on
FROM (
    SELECT *, max(reward) OVER (PARTITION BY run, prompt_id) AS best
    FROM v_reward_matrix
    WHERE run = :run
) AS cells
GROUP BY position, teacher
ORDER BY position
