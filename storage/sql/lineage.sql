-- Every model with the chain of models it comes from, the oldest first.
-- A model finetuned in two rounds has two rows; `generation` 0 was trained from scratch.
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
)
SELECT
    m.round, m.role, m.model_id, m.parent_id, c.generation,
    array_to_string([left(id, 8) FOR id IN c.ancestry], ' > ') AS ancestry,
    m.trained_on, m.promoted, m.created_at, m.arm
FROM models m
JOIN chain c ON c.model_id = m.model_id
ORDER BY m.round, c.generation, m.role;
