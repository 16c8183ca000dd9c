-- BLIP's filter: a text stays when the filter finds it likelier than $threshold that it describes
-- its picture. Synthetic texts face the same bar as web texts; what stays of both is pooled
-- (Li et al. 2022, section 3.3).
--
-- parameter threshold: number = 0.5, from 0 to 1: least itm_prob of a kept text
-- decides: image by image
--
-- A policy reads `candidates`, one row for every text (caption_id, image_id, source, caption,
-- itm_prob, itc_sim, score_status, score_error, source_name), and gives caption_id, kept, reason for
-- each. Who gives image_id and source too spares the program a join.
SELECT
    caption_id, image_id, source,
    coalesce(itm_prob >= $threshold, false) AS kept,
    CASE
        WHEN itm_prob >= $threshold THEN 'itm_prob >= ' || CAST($threshold AS VARCHAR)
        WHEN itm_prob IS NOT NULL
            THEN format('itm_prob {:.4f} < ', itm_prob) || CAST($threshold AS VARCHAR)
        WHEN score_error IS NOT NULL THEN 'not scored: ' || score_error
        ELSE 'not scored'
    END AS reason
FROM candidates
