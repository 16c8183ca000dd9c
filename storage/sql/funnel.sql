-- From URLs to clean pairs: how many rows each stage had, by outcome.
-- Within a step the rows add up: every listed URL has one outcome at `fetched`, every text one at
-- `scored` and one at `decided`. Intake is shared by all rounds, so each round shows it.
CREATE OR REPLACE VIEW funnel AS
WITH turns AS (
    SELECT DISTINCT round FROM decisions
    UNION SELECT DISTINCT round FROM scores
    UNION SELECT DISTINCT round FROM captions WHERE round > 0
    UNION SELECT DISTINCT round FROM rounds
),
every_round AS (
    SELECT round FROM turns
    -- Before the first round there is intake to see.
    UNION ALL SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM turns)
),
listed AS (
    SELECT 1 AS step, 'urls' AS stage, 'listed' AS outcome, count(*) AS rows
    FROM pairs WHERE pool = 'web'
),
fetched AS (
    SELECT 2 AS step, 'fetched' AS stage, status AS outcome, count(*) AS rows
    FROM pairs WHERE pool = 'web' GROUP BY status
),
texts AS (
    SELECT
        r.round, 3 AS step, 'texts' AS stage,
        CASE c.status WHEN 'ok' THEN c.source ELSE c.source || ', ' || c.status END AS outcome,
        count(*) AS rows
    FROM every_round r
    JOIN captions c
        ON (c.source = 'web' AND c.round = 0) OR (c.source = 'synthetic' AND c.round = r.round)
    GROUP BY ALL
),
scored AS (
    SELECT
        d.round, 4 AS step, 'scored' AS stage,
        d.source || ', ' || coalesce(s.status, 'not scored') AS outcome,
        count(*) AS rows
    FROM active_decisions d
    LEFT JOIN scores s ON s.caption_id = d.caption_id AND s.round = d.round
    GROUP BY ALL
),
decided AS (
    SELECT
        d.round, 5 AS step, 'decided' AS stage,
        d.source || CASE WHEN d.kept THEN ', kept' ELSE ', dropped: ' ||
            -- 'itm_prob 0.1234 < 0.5' becomes 'itm_prob < 0.5': one line for each kind of reason.
            regexp_replace(d.reason, '^(it[mc]_\w+) -?[0-9.]+(e-?[0-9]+)? ', '\1 ')
        END AS outcome,
        count(*) AS rows
    FROM active_decisions d
    GROUP BY ALL
)
SELECT round, step, stage, outcome, rows FROM every_round, listed
UNION ALL SELECT round, step, stage, outcome, rows FROM every_round, fetched
UNION ALL SELECT round, step, stage, outcome, rows FROM texts
UNION ALL SELECT round, step, stage, outcome, rows FROM scored
UNION ALL SELECT round, step, stage, outcome, rows FROM decided
ORDER BY round, step, rows DESC, outcome;
