-- Where the bytes of each image lie: one row for every image_id that is stored.
-- The same picture may be in two pools (web and heldout, say); any copy has the same bytes, and
-- the smallest key picks the same one in every run. `heldout`: never trained on, since models are
-- evaluated on it or filters audited with it.
CREATE OR REPLACE VIEW images AS
SELECT
    image_id,
    arg_min(shard, key)    AS shard,
    arg_min("offset", key) AS "offset",
    arg_min(size, key)     AS size,
    image_id IN (SELECT image_id FROM reserved) AS heldout
FROM pairs
WHERE status = 'ok'
GROUP BY image_id;
