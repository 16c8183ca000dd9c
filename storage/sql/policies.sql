-- Every decision set that lies in the lake: which policy, with which parameters, what it kept, which one counts.
-- `counts`: clean and the other views follow it. `of_round`: the round's own settings made it, and the round's model was
-- trained on it.
CREATE OR REPLACE VIEW policies AS
SELECT
    d.round, d.policy, d.generation, any_value(d.params) AS params,
    coalesce(bool_or(d.generation = a.generation), false) AS counts,
    coalesce(bool_or(d.generation = a.of_round), false)   AS of_round,
    count(*)                                              AS texts,
    count(*) FILTER (WHERE d.kept)                        AS kept,
    count(*) FILTER (WHERE d.kept) / count(*)             AS share_kept,
    count(*) FILTER (WHERE d.kept AND d.source = 'web')       AS kept_web,
    count(*) FILTER (WHERE d.kept AND d.source = 'synthetic') AS kept_synthetic
FROM decisions d
LEFT JOIN active_policies a ON a.round = d.round
GROUP BY d.round, d.policy, d.generation
ORDER BY d.round, counts DESC, d.generation;
