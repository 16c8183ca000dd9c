-- The clean set: what the last decided round kept, of web texts and synthetic ones.
CREATE OR REPLACE VIEW clean AS
SELECT * EXCLUDE (kept)
FROM verdicts
WHERE kept AND round = (SELECT max(round) FROM active_decisions);
