-- The web pairs as they came, unfiltered: what a model is trained on without bootstrapping.
CREATE OR REPLACE VIEW raw AS
SELECT
    c.caption_id, c.image_id, c.source, c.caption,
    p.url, p.source_name, p.shard, p."offset", p.size, p.width, p.height
FROM captions c
JOIN pairs p ON p.image_id = c.image_id AND p.pool = 'web' AND p.status = 'ok'
WHERE c.source = 'web'
  AND c.status = 'ok'
  AND NOT EXISTS (SELECT 1 FROM reserved h WHERE h.image_id = c.image_id);
