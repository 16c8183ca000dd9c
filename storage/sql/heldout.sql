-- Pairs that people captioned and that only evaluation may see.
CREATE OR REPLACE VIEW heldout AS
SELECT
    c.caption_id, c.image_id, c.source, c.caption,
    p.url, p.source_name, p.shard, p."offset", p.size, p.width, p.height
FROM captions c
JOIN pairs p ON p.image_id = c.image_id AND p.pool = 'heldout' AND p.status = 'ok'
WHERE c.source = 'human';
