-- operator: How much did routing save?
-- Compared with all teachers answering all prompts at their mean length on the grid; share is the fraction that was generated.
SELECT sum(response_tokens) AS tokens, sum(response_tokens_if_all) AS tokens_if_all,
       sum(response_tokens) / sum(response_tokens_if_all) AS share,
       sum(dollars) AS dollars, sum(dollars_if_all) AS dollars_if_all
FROM v_teacher_cost
WHERE run = :run
