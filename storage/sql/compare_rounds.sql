-- The rounds side by side: what each kept, how its captions and its filter did, what its model reached, what it
-- cost, and how it ended. A figure that a round did not measure is null.
CREATE OR REPLACE VIEW compare_rounds AS
WITH kept AS (
    SELECT
        round,
        count(*)                                              AS texts,
        count(*) FILTER (WHERE kept)                          AS kept,
        count(*) FILTER (WHERE kept AND source = 'web')       AS kept_web,
        count(*) FILTER (WHERE kept AND source = 'synthetic') AS kept_synthetic,
        count(*) FILTER (WHERE source = 'web')                AS web,
        count(*) FILTER (WHERE source = 'synthetic')          AS synthetic
    FROM verdicts
    GROUP BY round
),
own AS (
    -- Of the round's own model; the champion it was compared with, and a filter, may be measured there too.
    SELECT m.round, m.metric, m.value, m.low, m.high
    FROM metrics m
    SEMI JOIN (SELECT model_id, round FROM models WHERE role = 'med') USING (model_id, round)
    WHERE m.dataset = 'heldout'
),
reached AS (
    SELECT
        round,
        max(value)      FILTER (WHERE metric = 'mean_recall') AS mean_recall,
        max_by(low, value)  FILTER (WHERE metric = 'mean_recall') AS mean_recall_low,
        max_by(high, value) FILTER (WHERE metric = 'mean_recall') AS mean_recall_high,
        max(value)      FILTER (WHERE metric = 'cider')       AS cider
    FROM own
    GROUP BY round
),
watched AS (
    SELECT
        round,
        max(value) FILTER (WHERE dataset = 'captions' AND metric = 'distinct_share')     AS distinct_share,
        max(value) FILTER (WHERE dataset = 'captions' AND metric = 'matched_share')      AS matched_share,
        max(value) FILTER (WHERE dataset = 'canaries' AND metric = 'filter_precision')   AS filter_precision,
        max(value) FILTER (WHERE dataset = 'canaries' AND metric = 'filter_recall')      AS filter_recall,
        max(value) FILTER (WHERE dataset = 'canaries' AND metric = 'noise_left')         AS noise_left,
        max(value) FILTER (WHERE dataset = 'judge' AND metric = 'judge_agreement')       AS judge_agreement
    FROM metrics
    GROUP BY round
),
judged AS (
    SELECT
        round,
        max(value) FILTER (WHERE rule = 'recall_clearly_worse') AS recall_gain,
        max(low)   FILTER (WHERE rule = 'recall_clearly_worse') AS recall_gain_low,
        max(high)  FILTER (WHERE rule = 'recall_clearly_worse') AS recall_gain_high,
        string_agg(rule, ', ' ORDER BY rule) FILTER (WHERE outcome = 'fail') AS failed_rules
    FROM gate_rules
    GROUP BY round
),
spent AS (
    SELECT round, sum(seconds) AS seconds, sum(device_seconds) AS device_seconds
    FROM round_costs
    GROUP BY round
)
SELECT
    r.round, r.status, r.decided_by, k.texts, k.kept, k.kept / k.texts AS share_kept,
    k.kept_web, k.kept_synthetic,
    k.kept_web / nullif(k.web, 0)             AS share_kept_web,
    k.kept_synthetic / nullif(k.synthetic, 0) AS share_kept_synthetic,
    w.distinct_share, w.matched_share,
    w.filter_precision, w.filter_recall, w.noise_left, w.judge_agreement,
    m.mean_recall AS best_mean_recall, m.mean_recall_low, m.mean_recall_high, m.cider,
    j.recall_gain, j.recall_gain_low, j.recall_gain_high, j.failed_rules,
    s.seconds, s.device_seconds,
    s.seconds / nullif(k.kept, 0)        AS seconds_per_kept,
    s.device_seconds / nullif(k.kept, 0) AS device_seconds_per_kept,
    r.champion_before, r.champion_after, r.why
FROM rounds r
LEFT JOIN kept k USING (round)
LEFT JOIN reached m USING (round)
LEFT JOIN watched w USING (round)
LEFT JOIN judged j USING (round)
LEFT JOIN spent s USING (round)
ORDER BY r.round;
