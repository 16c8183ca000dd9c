-- One row for every registered model, with the rounds' verdict on it; `arm` says of a comparison's models which arm.
CREATE OR REPLACE VIEW models AS
SELECT
    m.*,
    EXISTS (
        SELECT 1 FROM rounds r WHERE r.champion_after = m.model_id AND r.status = 'promoted'
    ) AS promoted,
    a.arm
FROM model_records m
LEFT JOIN (
    -- Two policies that keep the same texts have one model.
    SELECT
        round, model_id, 'arm' AS role,
        string_agg(
            generation || ', seed ' || seed || ', ' || steps || ' steps', '; '
            ORDER BY generation, seed, steps
        ) AS arm
    FROM arms
    GROUP BY round, model_id
) a USING (round, model_id, role);
