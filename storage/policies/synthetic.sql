-- Every synthetic text, and no web one: what the captioner alone can teach.
--
-- decides: image by image
SELECT
    caption_id, image_id, source,
    source = 'synthetic' AS kept,
    CASE source WHEN 'synthetic' THEN 'synthetic text' ELSE 'web text: not used' END AS reason
FROM candidates
