-- The web texts that pass BLIP's bar, and no synthetic one: the filter without the captioner
-- (Li et al. 2022, Table 1, the row with F alone).
--
-- parameter threshold: number = 0.5, from 0 to 1: least itm_prob of a kept text
-- decides: image by image
SELECT
    caption_id, image_id, source,
    source = 'web' AND coalesce(itm_prob >= $threshold, false) AS kept,
    CASE
        WHEN source <> 'web'        THEN 'synthetic text: not used'
        WHEN itm_prob >= $threshold THEN 'itm_prob >= ' || CAST($threshold AS VARCHAR)
        WHEN itm_prob IS NOT NULL
            THEN format('itm_prob {:.4f} < ', itm_prob) || CAST($threshold AS VARCHAR)
        WHEN score_error IS NOT NULL THEN 'not scored: ' || score_error
        ELSE 'not scored'
    END AS reason
FROM candidates
