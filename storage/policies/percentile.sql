-- A share of each source: the best $share of the web texts and the best $share of the synthetic ones.
-- Web texts and synthetic texts have different distributions; one cut for both favours the synthetic.
--
-- The cut is the number of the text that is last within the share, ceil(share x texts) from the top.
-- Tie rule: texts with the very number of the cut all stay, so that like is treated alike; the kept
-- share is never below $share, and above it only by ties. Share 1 keeps every scored text, 0 none.
-- A text without a number is never kept and does not count.
--
-- parameter share: number = 0.5, from 0 to 1: share of each source's scored texts that is kept
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
    SELECT source, percentile_disc($share) WITHIN GROUP (ORDER BY number DESC) AS cut
    FROM ranked
    WHERE number IS NOT NULL AND $share > 0
    GROUP BY source
)
SELECT
    caption_id, image_id, source,
    coalesce(number >= cut, false) AS kept,
    CASE
        WHEN number IS NULL AND score_error IS NOT NULL THEN 'not scored: ' || score_error
        WHEN number IS NULL THEN 'not scored'
        WHEN cut IS NULL    THEN 'share 0 keeps nothing'
        WHEN number >= cut  THEN $ranked_by || format(' >= {:.4f}, the cut of ', cut) || source || ' texts'
        ELSE format('{} {:.4f} < {:.4f}, the cut of ', $ranked_by, number, cut) || source || ' texts'
    END AS reason
FROM ranked
LEFT JOIN cuts USING (source)
