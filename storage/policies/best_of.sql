-- One text an image: the best of what was proposed for it, if it reaches $least.
-- For losses that want one caption a picture, and for nothing lost: no image goes without a text that
-- was scored. Of equal numbers the web text wins (it knows names that no captioner knows), then the
-- smaller caption_id.
--
-- parameter ranked_by: text = itm_prob, one of itm_prob, itc_sim: the number that texts are ranked by
-- parameter least: number = -1, from -1 to 1: least number of a kept text; -1 lets any scored text win
-- may be null: itm_prob, itc_sim
-- decides: image by image
WITH numbered AS (
    SELECT
        caption_id, image_id, source, score_error,
        CASE $ranked_by WHEN 'itm_prob' THEN itm_prob ELSE itc_sim END AS number
    FROM candidates
),
ranked AS (
    SELECT
        caption_id, image_id, source, score_error, number,
        row_number() OVER (
            PARTITION BY image_id ORDER BY number DESC NULLS LAST, source DESC, caption_id
        ) AS place
    FROM numbered
)
SELECT
    caption_id, image_id, source,
    coalesce(place = 1 AND number >= $least, false) AS kept,
    CASE
        WHEN number IS NULL AND score_error IS NOT NULL THEN 'not scored: ' || score_error
        WHEN number IS NULL   THEN 'not scored'
        WHEN number < $least  THEN format('{} {:.4f} < ', $ranked_by, number) || CAST($least AS VARCHAR)
        WHEN place = 1        THEN 'best ' || $ranked_by || ' of its image'
        ELSE format('{} {:.4f} is not the best of its image', $ranked_by, number)
    END AS reason
FROM ranked
