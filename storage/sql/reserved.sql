-- Images that nothing may be trained on: models are evaluated on them, or filters audited with them.
CREATE OR REPLACE VIEW reserved AS
SELECT image_id FROM pairs WHERE pool = 'heldout' AND image_id IS NOT NULL
UNION
SELECT image_id FROM canary_draws WHERE is_canary;
