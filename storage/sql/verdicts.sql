-- Every decision of every round under that round's active policy, with all that led to it.
-- `clean`, `rejected` and `noise` are this view, narrowed.
CREATE OR REPLACE VIEW verdicts AS
SELECT
    d.round,
    d.policy,
    d.generation,
    d.kept,
    d.reason,
    d.caption_id,
    d.image_id,
    d.source,
    c.caption,
    s.itm_prob,
    s.itc_sim,
    p.url,
    p.source_name,
    p.shard,
    p."offset",
    p.size,
    p.width,
    p.height
FROM active_decisions d
-- Web texts belong to round 0; a synthetic text may be proposed again in a later round.
JOIN captions c
    ON  c.caption_id = d.caption_id
    AND c.status = 'ok'
    AND c.round = CASE d.source WHEN 'web' THEN 0 ELSE d.round END
LEFT JOIN scores s ON s.caption_id = d.caption_id AND s.round = d.round
JOIN pairs p ON p.image_id = d.image_id AND p.pool = 'web' AND p.status = 'ok'
-- What is held out for evaluation is never trained on, whoever serves it.
WHERE NOT EXISTS (SELECT 1 FROM reserved h WHERE h.image_id = d.image_id);
