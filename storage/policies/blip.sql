-- BLIP's filter: a text stays when the filter finds it likelier than $threshold that it describes
-- its picture. Synthetic texts face the same bar as web texts.
--
-- A policy reads `candidates`, one row for every text (caption_id, image_id, source, caption,
-- itm_prob, itc_sim, score_status, score_error), and gives caption_id, kept, reason for each.
SELECT
    caption_id,
    coalesce(itm_prob >= $threshold, false) AS kept,
    CASE
        WHEN itm_prob >= $threshold THEN 'itm_prob >= ' || CAST($threshold AS VARCHAR)
        WHEN itm_prob IS NOT NULL
            THEN format('itm_prob {:.4f} < ', itm_prob) || CAST($threshold AS VARCHAR)
        WHEN score_error IS NOT NULL THEN 'not scored: ' || score_error
        ELSE 'not scored'
    END AS reason
FROM candidates
