-- The k best texts of each image, web and synthetic ranked together (BLIP-2: ten captions and the web
-- text ranked by a CLIP, two kept; one of them drawn at each step). No threshold: every image with k
-- scored texts keeps k. Of equal numbers the web text goes first, then the smaller caption_id.
--
-- parameter k: whole number = 2, from 1 to 1000: texts kept for an image
-- parameter ranked_by: text = itm_prob, one of itm_prob, itc_sim: the number that texts are ranked by
-- may be null: itm_prob, itc_sim
-- decides: image by image
WITH ranked AS (
    SELECT
        caption_id, image_id, source, score_error,
        CASE $ranked_by WHEN 'itm_prob' THEN itm_prob ELSE itc_sim END AS number,
        row_number() OVER (
            PARTITION BY image_id
            ORDER BY
                CASE $ranked_by WHEN 'itm_prob' THEN itm_prob ELSE itc_sim END DESC NULLS LAST,
                source DESC, caption_id
        ) AS place
    FROM candidates
)
SELECT
    caption_id, image_id, source,
    number IS NOT NULL AND place <= $k AS kept,
    CASE
        WHEN number IS NULL AND score_error IS NOT NULL THEN 'not scored: ' || score_error
        WHEN number IS NULL THEN 'not scored'
        WHEN place <= $k    THEN 'among the best ' || CAST($k AS VARCHAR) || ' of its image by ' || $ranked_by
        ELSE format('{} {:.4f} is not among the best ', $ranked_by, number)
            || CAST($k AS VARCHAR) || ' of its image'
    END AS reason
FROM ranked
