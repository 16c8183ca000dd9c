-- What the last decided round dropped, and why.
CREATE OR REPLACE VIEW rejected AS
SELECT * EXCLUDE (kept)
FROM verdicts
WHERE NOT kept AND round = (SELECT max(round) FROM active_decisions);
