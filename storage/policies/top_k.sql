-- The k best texts of each image, web and synthetic ranked together (BLIP-2: ten captions and the web
-- text ranked by a CLIP, two kept; one of them drawn at each step). No threshold: every image with k
-- scored texts keeps k. Of equal numbers the web text goes first, then the smaller caption_id.
-- The judge's numbers rank by a model that no round has trained; it knows the texts of its sample alone.
--
-- parameter k: whole number = 2, from 1 to 1000: texts kept for an image
-- parameter ranked_by: text = itm_prob, one of itm_prob, itc_sim, judge_itm_prob, judge_itc_sim: the number that texts are ranked by
-- may be null: itm_prob, itc_sim
-- decides: image by image
WITH numbered AS (
    SELECT
        caption_id, image_id, source, score_error,
        CASE $ranked_by
            WHEN 'itm_prob'       THEN itm_prob
            WHEN 'itc_sim'        THEN itc_sim
            WHEN 'judge_itm_prob' THEN judge_itm_prob
            ELSE judge_itc_sim
        END AS number
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
    number IS NOT NULL AND place <= $k AS kept,
    CASE
        WHEN number IS NULL AND score_error IS NOT NULL THEN 'not scored: ' || score_error
        WHEN number IS NULL THEN CASE WHEN $ranked_by LIKE 'judge%' THEN 'not judged' ELSE 'not scored' END
        WHEN place <= $k    THEN 'among the best ' || CAST($k AS VARCHAR) || ' of its image by ' || $ranked_by
        ELSE format('{} {:.4f} is not among the best ', $ranked_by, number)
            || CAST($k AS VARCHAR) || ' of its image'
    END AS reason
FROM ranked
