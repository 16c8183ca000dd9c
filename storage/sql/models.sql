-- One row for every registered model, with the rounds' verdict on it.
CREATE OR REPLACE VIEW models AS
SELECT
    m.*,
    EXISTS (
        SELECT 1 FROM rounds r WHERE r.champion_after = m.model_id AND r.status = 'promoted'
    ) AS promoted
FROM model_records m;
