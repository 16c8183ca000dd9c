-- Every web text, as it came, and no synthetic one: what there is without bootstrapping.
-- The arm that filtering and captioning are measured against.
--
-- decides: image by image
SELECT
    caption_id, image_id, source,
    source = 'web' AS kept,
    CASE source WHEN 'web' THEN 'web text' ELSE 'synthetic text: not used' END AS reason
FROM candidates
