-- Every decision on captions that another decoding wrote beside a round's own (`variant`), with all that led to it, and on the
-- web texts beside them. A comparison made them; neither `verdicts` nor any other view shows one.
CREATE OR REPLACE VIEW variant_verdicts AS
WITH texts AS (
    SELECT d.*, c.caption, s.itm_prob, s.itc_sim
    FROM variant_decisions d
    JOIN captions c ON c.caption_id = d.caption_id AND c.status = 'ok' AND c.round = 0
    LEFT JOIN scores s ON s.caption_id = d.caption_id AND s.round = d.round
    WHERE d.source = 'web'
    UNION ALL
    SELECT d.*, c.caption, s.itm_prob, s.itc_sim
    FROM variant_decisions d
    JOIN variant_captions c
        ON  c.caption_id = d.caption_id
        AND c.status = 'ok'
        AND c.round = d.round
        AND c.variant = d.variant
    LEFT JOIN variant_scores s
        ON  s.caption_id = d.caption_id
        AND s.round = d.round
        AND s.variant = d.variant
    WHERE d.source = 'synthetic'
)
SELECT
    t.round,
    t.variant,
    t.policy,
    t.generation,
    t.kept,
    t.reason,
    t.caption_id,
    t.image_id,
    t.source,
    t.caption,
    t.itm_prob,
    t.itc_sim,
    p.url,
    p.source_name,
    p.shard,
    p."offset",
    p.size,
    p.width,
    p.height
FROM texts t
JOIN pairs p ON p.image_id = t.image_id AND p.pool = 'web' AND p.status = 'ok'
-- What is held out for evaluation is never trained on, whoever serves it.
WHERE NOT EXISTS (SELECT 1 FROM reserved h WHERE h.image_id = t.image_id);
