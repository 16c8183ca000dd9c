-- A filter by cosine: a text stays when its features and its picture's are at least $threshold alike.
-- For scorers that give itc_sim alone, such as a CLIP; what is a fair threshold depends on the model
-- (some 0.25 to 0.3 for CLIP, 0.05 to 0.15 for SigLIP): look at the quantiles of itc_sim first.
--
-- parameter threshold: number = 0.28, from -1 to 1: least itc_sim of a kept text
-- decides: image by image
SELECT
    caption_id, image_id, source,
    coalesce(itc_sim >= $threshold, false) AS kept,
    CASE
        WHEN itc_sim >= $threshold THEN 'itc_sim >= ' || CAST($threshold AS VARCHAR)
        WHEN itc_sim IS NOT NULL
            THEN format('itc_sim {:.4f} < ', itc_sim) || CAST($threshold AS VARCHAR)
        WHEN score_error IS NOT NULL THEN 'not scored: ' || score_error
        ELSE 'not scored'
    END AS reason
FROM candidates
