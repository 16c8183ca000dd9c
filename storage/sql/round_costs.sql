-- What each stage of each round cost: wall seconds, and seconds in which it held the device.
-- A stage counts once, the first time it was finished; `share` is of the round's wall seconds.
CREATE OR REPLACE VIEW round_costs AS
WITH stages AS (
    SELECT
        round,
        unnest(json_keys(seconds)) AS stage,
        seconds, device_seconds
    FROM rounds
),
spent AS (
    SELECT
        round, stage,
        CAST(json_extract(seconds, '$."' || stage || '"') AS DOUBLE) AS seconds,
        coalesce(CAST(json_extract(device_seconds, '$."' || stage || '"') AS DOUBLE), 0)
            AS device_seconds
    FROM stages
)
SELECT
    round, stage, seconds, device_seconds,
    seconds / nullif(sum(seconds) OVER (PARTITION BY round), 0) AS share
FROM spent
ORDER BY round, seconds DESC, stage;
