-- engineer: Where does this row of a dataset come from?
-- By the prompt_id that each exported row carries. `persyn trace` says more, and in more words.
SELECT d.teacher, d.model, d.revision, d.template_hash, d.reason, d.score, d.margin, d.engine, d.seed,
       o.fingerprint AS router, o.backbone, d.response_id, d.job_id, j.run AS written_by_run, j.worker, d.created_at
FROM v_dataset d
JOIN runs r ON r.name = d.run
LEFT JOIN routers o ON o.id = r.router_id
LEFT JOIN v_jobs j ON j.job_id = d.job_id
WHERE d.run = :run AND d.prompt_id = :prompt
