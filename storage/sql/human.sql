-- Pairs that people captioned and that may be trained on.
CREATE OR REPLACE VIEW human AS
SELECT
    c.caption_id, c.image_id, c.source, c.caption,
    p.url, p.source_name, p.shard, p."offset", p.size, p.width, p.height
FROM captions c
JOIN pairs p ON p.image_id = c.image_id AND p.pool = 'human' AND p.status = 'ok'
WHERE c.source = 'human'
  AND NOT EXISTS (SELECT 1 FROM reserved h WHERE h.image_id = c.image_id);
