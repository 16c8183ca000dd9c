-- Every model with the chain of models it comes from, the oldest first.
-- A model finetuned in two rounds has two rows; `generation` 0 was trained from scratch.
-- `purged_images`: images it was trained on and that were purged since; `purged_in_ancestry`: the same of it and of all
-- models that it comes from.
CREATE OR REPLACE VIEW lineage AS
WITH RECURSIVE born AS (
    SELECT DISTINCT model_id, parent_id FROM model_records
),
chain AS (
    SELECT model_id, 0 AS generation, [model_id] AS ancestry
    FROM born
    WHERE parent_id IS NULL OR parent_id NOT IN (SELECT model_id FROM born)
    UNION ALL
    SELECT b.model_id, c.generation + 1, list_append(c.ancestry, b.model_id)
    FROM born b
    JOIN chain c ON b.parent_id = c.model_id
    WHERE NOT list_contains(c.ancestry, b.model_id)
),
purged_from AS (
    SELECT DISTINCT image_id, unnest(from_json(models, '["VARCHAR"]')) AS model_id
    FROM purged WHERE image_id IS NOT NULL
),
own AS (
    SELECT model_id, count(*) AS images FROM purged_from GROUP BY model_id
),
inherited AS (
    SELECT c.model_id, count(DISTINCT p.image_id) AS images
    FROM (SELECT DISTINCT model_id, unnest(ancestry) AS ancestor FROM chain) c
    JOIN purged_from p ON p.model_id = c.ancestor
    GROUP BY c.model_id
)
SELECT
    m.round, m.role, m.model_id, m.parent_id, c.generation,
    array_to_string([left(id, 8) FOR id IN c.ancestry], ' > ') AS ancestry,
    m.trained_on, m.promoted, m.created_at, m.arm,
    coalesce(o.images, 0) AS purged_images, coalesce(i.images, 0) AS purged_in_ancestry
FROM models m
JOIN chain c ON c.model_id = m.model_id
LEFT JOIN own o ON o.model_id = m.model_id
LEFT JOIN inherited i ON i.model_id = m.model_id
ORDER BY m.round, c.generation, m.role;
