-- Where the bytes of each image lie: one row for every image_id that is stored.
-- The same picture may be in two pools (web and heldout, say); any copy has the same bytes, and
-- the smallest key picks the same one in every run.
CREATE OR REPLACE VIEW images AS
SELECT
    image_id,
    arg_min(shard, key)    AS shard,
    arg_min("offset", key) AS "offset",
    arg_min(size, key)     AS size,
    bool_or(pool = 'heldout') AS heldout
FROM pairs
WHERE status = 'ok'
GROUP BY image_id;
