"""The SQL of the report. Parameters are named: $round, $generation, and what a query's comment says."""

TEXTS = """
    texts AS (
        SELECT c.caption_id, c.image_id, c.source, c.caption, s.itm_prob, s.itc_sim,
            coalesce(s.itm_prob, s.itc_sim) AS liking,
            d.kept, d.reason, d.params, coalesce(s.status = 'ok', false) AS is_scored
        FROM captions c
        LEFT JOIN scores s ON s.caption_id = c.caption_id AND s.round = $round
        LEFT JOIN decisions d
            ON d.caption_id = c.caption_id AND d.round = $round
            AND coalesce(d.generation, d.policy) = $generation
        WHERE c.status = 'ok' AND (
            (c.source = 'web' AND c.round = 0)
            OR (c.source = 'synthetic' AND c.round = $round))
    )
"""
"""Every text that the round had to decide on, with what was found and decided.

`liking` is what the scorer gives: itm_prob, or the cosine of one that has no matching head."""

POLICY = """
SELECT policy, coalesce(generation, policy) AS generation, any_value(params) AS params
FROM decisions WHERE round = $round GROUP BY ALL ORDER BY ALL
"""

PAIR_OUTCOMES = """
SELECT status, count(*) AS rows FROM pairs WHERE pool = 'web'
GROUP BY status ORDER BY rows DESC, status
"""

FAILED_CAPTIONS = """
SELECT source || ' text: ' || status AS reason, count(*) AS rows FROM captions
WHERE status <> 'ok' AND source IN ('web', 'synthetic') AND round IN (0, $round)
GROUP BY ALL ORDER BY rows DESC, reason
"""

TEXT_COUNTS = f"""
WITH {TEXTS}
SELECT source, count(*) AS proposed, count(*) FILTER (is_scored) AS scored,
    count(*) FILTER (kept) AS kept
FROM texts GROUP BY source ORDER BY source DESC
"""

# The number in a reason differs from text to text; the rule does not.
DROP_REASONS = f"""
WITH {TEXTS}
SELECT source || ': ' || regexp_replace(reason, '^(it[mc]_\\w+) -?[0-9.]+ ', '\\1 ') AS why,
    NOT is_scored AS unscored, count(*) AS rows
FROM texts WHERE NOT kept GROUP BY ALL ORDER BY rows DESC, why
"""

NOISE = f"""
WITH {TEXTS}, sources AS (
    SELECT image_id, min(source_name) AS source_name FROM pairs
    WHERE pool = 'web' AND status = 'ok' GROUP BY image_id
)
SELECT source_name, count(*) AS texts, count(*) FILTER (NOT kept) AS dropped
FROM texts JOIN sources USING (image_id) WHERE source = 'web' AND kept IS NOT NULL
GROUP BY source_name ORDER BY avg((NOT kept)::INT), source_name
"""

HISTOGRAM = f"""
WITH {TEXTS}
SELECT source, least(19, floor(itm_prob * 20))::INT AS bin,
    count(*) FILTER (kept) AS kept, count(*) FILTER (NOT kept) AS dropped
FROM texts WHERE itm_prob IS NOT NULL AND kept IS NOT NULL GROUP BY ALL ORDER BY ALL
"""

PICK = """
WITH {texts}
SELECT image_id, caption_id FROM texts
WHERE source = $source AND kept = $kept AND liking IS NOT NULL
ORDER BY liking {order}, caption_id LIMIT $limit
"""

# Pictures whose web text went and whose synthetic caption came in its place.
PICK_REPLACED = f"""
WITH {TEXTS}
SELECT w.image_id, any_value(s.caption_id) AS caption_id
FROM texts w JOIN texts s ON s.image_id = w.image_id AND s.source = 'synthetic' AND s.kept
WHERE w.source = 'web' AND NOT w.kept
GROUP BY w.image_id ORDER BY max(s.liking - w.liking) DESC, w.image_id LIMIT $limit
"""

# Texts of which the judge, a scorer outside the loop, thinks otherwise than the filter.
PICK_APART = f"""
WITH {TEXTS}
SELECT t.image_id, t.caption_id FROM texts t
JOIN judgements j ON j.caption_id = t.caption_id AND j.round = $round
WHERE abs(t.itm_prob - j.itm_prob) > 0.1
ORDER BY abs(t.itm_prob - j.itm_prob) DESC, t.caption_id LIMIT $limit
"""

# Texts that the filter of the round before saw otherwise: the same web texts, and captions written again.
PICK_CHANGED = f"""
WITH {TEXTS}
SELECT t.image_id, t.caption_id FROM texts t
JOIN scores b ON b.caption_id = t.caption_id AND b.round = $round - 1
WHERE abs(t.itm_prob - b.itm_prob) > 0.1
ORDER BY abs(t.itm_prob - b.itm_prob) DESC, t.caption_id LIMIT $limit
"""

# $images: the chosen pictures.
CARD_TEXTS = f"""
WITH {TEXTS}
SELECT image_id, caption_id, source, caption, itm_prob, itc_sim,
    coalesce(kept, false) AS kept, coalesce(reason, 'not decided') AS reason
FROM texts WHERE list_contains($images, image_id)
ORDER BY image_id, source DESC, liking DESC, caption_id
"""

CARD_IMAGES = """
SELECT image_id, min_by(source_name, row) AS source_name, min_by(shard, row) AS shard,
    min_by("offset", row) AS "offset", min_by(size, row) AS size
FROM pairs WHERE pool = 'web' AND status = 'ok' AND list_contains($images, image_id)
GROUP BY image_id
"""

# The round's models with all their ancestors; $champion is null in round 1, which has the pretrained model to beat.
MODELS = """
WITH RECURSIVE wanted AS (
    SELECT model_id, parent_id FROM models WHERE role <> 'arm' AND round = $round
        OR model_id = $champion
        OR (role = 'med' AND round = 0 AND $champion IS NULL)
    UNION SELECT m.model_id, m.parent_id FROM models m JOIN wanted w ON w.parent_id = m.model_id
), made AS (
    SELECT model_id, min(dataset) AS dataset FROM metrics
    WHERE dataset LIKE 'train-%' AND dataset NOT LIKE 'train-arm-%'
    GROUP BY model_id
)
SELECT DISTINCT m.model_id, m.role, m.parent_id, m.round, m.trained_on,
    coalesce(made.dataset[7:], m.role) AS made, m.created_at
FROM models m JOIN wanted USING (model_id) LEFT JOIN made USING (model_id)
WHERE m.role <> 'arm'
ORDER BY m.round, m.created_at, m.model_id
"""

# $models: those of round $round and what its new model had to beat, trained by an earlier round.
CURVES = """
SELECT CASE WHEN round IN (0, $round) THEN dataset[7:] ELSE 'champion' END AS run,
    metric, n AS step, value
FROM metrics
WHERE dataset LIKE 'train-%' AND dataset NOT LIKE 'train-arm-%' AND metric IN ('loss_itc', 'loss_itm', 'loss_lm')
    AND value IS NOT NULL AND list_contains($models, model_id)
ORDER BY run, metric, step
"""

# $models: the two compared. The latest measurement of each metric counts.
MEASURED = """
SELECT dataset, model_id, metric, value, low, high, n FROM metrics
WHERE dataset NOT LIKE 'train-%' AND dataset <> 'arms' AND value IS NOT NULL AND list_contains($models, model_id)
QUALIFY row_number() OVER (PARTITION BY dataset, model_id, metric ORDER BY round DESC) = 1
ORDER BY dataset, metric
"""

# Figures of the captioner and the filter of the round itself.
FINETUNED = """
SELECT model_id, metric, value, low, high, n FROM metrics
WHERE protocol = 'finetuned' AND round = $round AND value IS NOT NULL ORDER BY model_id, metric
"""
