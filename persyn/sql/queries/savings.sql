-- operator: What did routing save?
-- Against all teachers answering all prompts, each as long as it answers on the grid; share is what was written of that.
SELECT sum(response_tokens) AS tokens, sum(response_tokens_if_all) AS tokens_if_all,
       sum(response_tokens) / sum(response_tokens_if_all) AS share,
       sum(dollars) AS dollars, sum(dollars_if_all) AS dollars_if_all
FROM v_teacher_cost
WHERE run = :run
