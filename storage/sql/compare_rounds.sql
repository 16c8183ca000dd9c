-- The rounds side by side: what each kept, and what its models reached.
CREATE OR REPLACE VIEW compare_rounds AS
WITH kept AS (
    SELECT
        round,
        count(*)                                             AS texts,
        count(*) FILTER (WHERE kept)                         AS kept,
        count(*) FILTER (WHERE kept AND source = 'web')       AS kept_web,
        count(*) FILTER (WHERE kept AND source = 'synthetic') AS kept_synthetic
    FROM verdicts
    GROUP BY round
),
reached AS (
    -- Of the round's own model; the champion it was compared with, and a filter, may be measured there too.
    SELECT round, max(value) AS best_mean_recall
    FROM metrics
    SEMI JOIN (SELECT model_id, round FROM models WHERE role = 'med') USING (model_id, round)
    WHERE metric = 'mean_recall'
    GROUP BY round
)
SELECT
    r.round, r.status, k.texts, k.kept, k.kept / k.texts AS share_kept,
    k.kept_web, k.kept_synthetic, m.best_mean_recall,
    r.champion_before, r.champion_after, r.why
FROM rounds r
LEFT JOIN kept k USING (round)
LEFT JOIN reached m USING (round)
ORDER BY r.round;
