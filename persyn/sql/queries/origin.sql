-- engineer: What is the origin of this dataset row?
-- Takes the prompt_id of an exported row. `persyn trace` shows the same in more detail.
SELECT d.teacher, d.model, d.revision, d.template_hash, d.reason, d.score, d.margin, d.engine, d.seed,
       o.fingerprint AS router, o.backbone, d.response_id, d.job_id, j.run AS written_by_run, j.worker, d.created_at
FROM v_dataset d
JOIN runs r ON r.name = d.run
LEFT JOIN routers o ON o.id = r.router_id
LEFT JOIN v_jobs j ON j.job_id = d.job_id
WHERE d.run = :run AND d.prompt_id = :prompt
