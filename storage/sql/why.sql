-- Everything known about an image, a caption or a URL: one row for every text and verdict on it,
-- or a single row where the image never came in.
--   SELECT * FROM why WHERE url = '...'      SELECT * FROM why WHERE caption_id = '...'
CREATE OR REPLACE VIEW why AS
SELECT
    p.image_id, p.url, p.pool, p.source_name, p.alt_text, p.status, p.reason AS status_reason,
    p.shard, p."offset", p.size, p.width, p.height, p.fetched_at,
    c.caption_id, c.source, c.caption, c.model_id AS captioner_id, c.top_p, c.seed,
    c.mean_logprob,
    coalesce(d.round, s.round, c.round) AS round,
    s.model_id AS filter_id, s.itm_prob, s.itc_sim, s.error AS scoring_error,
    d.policy, d.generation, d.kept, d.reason
FROM pairs p
LEFT JOIN captions c ON c.image_id = p.image_id AND p.status = 'ok'
LEFT JOIN scores s
    ON  s.caption_id = c.caption_id
    AND (c.round = 0 OR s.round = c.round)
LEFT JOIN decisions d
    ON  d.caption_id = c.caption_id
    AND d.round = coalesce(s.round, nullif(c.round, 0), d.round);
