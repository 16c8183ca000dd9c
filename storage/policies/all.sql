-- Every web text and every synthetic one, unfiltered: the captioner without the filter
-- (Li et al. 2022, Table 1, the row with C alone).
--
-- decides: image by image
SELECT caption_id, image_id, source, true AS kept, source || ' text' AS reason
FROM candidates
