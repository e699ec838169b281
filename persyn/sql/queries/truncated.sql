-- engineer: How many responses were truncated at max_tokens?
-- Counts responses of the dataset; longest is in tokens.
SELECT teacher, count(*) AS responses, sum(CASE WHEN finish_reason = 'length' THEN 1 ELSE 0 END) AS truncated,
       max(response_tokens) AS longest
FROM v_dataset
WHERE run = :run
GROUP BY teacher
ORDER BY truncated DESC, teacher
