-- The web text where it is good, a synthetic one where it is not (Nguyen et al. 2023, Improving
-- multimodal datasets with image captioning): web texts in the top $share of all web texts stay; an image
-- whose web text falls below gets its synthetic texts, if they pass the same cut. Names and places
-- that only people know stay in, which a captioner would write over.
--
-- The cut is the number of the web text that is last within the share, ceil(share x texts) from the
-- top; texts with the very number of the cut pass.
--
-- parameter share: number = 0.3, from 0 to 1: share of the scored web texts that stays
-- parameter ranked_by: text = itm_prob, one of itm_prob, itc_sim: the number that texts are ranked by
-- may be null: itm_prob, itc_sim
-- decides: image by image, after cuts
WITH ranked AS (
    SELECT
        caption_id, image_id, source, score_error,
        CASE $ranked_by WHEN 'itm_prob' THEN itm_prob ELSE itc_sim END AS number
    FROM candidates
),
cuts AS (
    SELECT percentile_disc($share) WITHIN GROUP (ORDER BY number DESC) AS cut
    FROM ranked
    WHERE source = 'web' AND number IS NOT NULL AND $share > 0
),
judged AS (
    SELECT
        caption_id, image_id, source, score_error, number, cut,
        max(CASE WHEN source = 'web' THEN number END) OVER (PARTITION BY image_id) >= cut AS web_stays
    FROM ranked, cuts
)
SELECT
    caption_id, image_id, source,
    coalesce(number >= cut AND (source = 'web' OR web_stays IS NOT TRUE), false) AS kept,
    CASE
        WHEN number IS NULL AND score_error IS NOT NULL THEN 'not scored: ' || score_error
        WHEN number IS NULL THEN 'not scored'
        WHEN cut IS NULL    THEN 'share 0 keeps nothing'
        WHEN source <> 'web' AND web_stays THEN 'the web text of its image stays'
        WHEN number >= cut  THEN $ranked_by || format(' >= {:.4f}, the cut of web texts', cut)
        ELSE format('{} {:.4f} < {:.4f}, the cut of web texts', $ranked_by, number, cut)
    END AS reason
FROM judged
