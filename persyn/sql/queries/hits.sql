-- researcher: How often does the router choose a best teacher on the hold-out?
-- Hit@1 and Hit@3 as in `persyn run status`, if no cell of the grid is missing. With three teachers or fewer hit3 is null, because it would always be 1.
SELECT count(*) AS prompts, avg(CASE WHEN place = 1 THEN 1.0 ELSE 0.0 END) AS hit1,
       CASE WHEN max(teachers) > 3 THEN avg(CASE WHEN place <= 3 THEN 1.0 ELSE 0.0 END) END AS hit3
FROM (
    SELECT m.prompt_id, min(CASE WHEN m.reward = m.best THEN w.router_rank END) AS place,
           max(m.position) + 1 AS teachers
    FROM (
        SELECT *, max(reward) OVER (PARTITION BY run, prompt_id) AS best,
               min(reward) OVER (PARTITION BY run, prompt_id) AS worst
        FROM v_reward_matrix
        WHERE run = :run AND role = 'holdout'
    ) AS m
    JOIN v_why_teacher w ON w.run = :run AND w.prompt_id = m.prompt_id AND w.position = m.position
    WHERE m.best > m.worst
    GROUP BY m.prompt_id
) AS ranked
