-- How much of each source's texts was dropped, noisiest first, for every round.
CREATE OR REPLACE VIEW noise AS
SELECT
    round,
    source_name,
    source,
    count(*)                                   AS texts,
    count(*) FILTER (WHERE NOT kept)           AS dropped,
    count(*) FILTER (WHERE NOT kept) / count(*) AS share_dropped,
    avg(itm_prob)                              AS mean_itm_prob,
    median(itm_prob)                           AS median_itm_prob
FROM verdicts
GROUP BY round, source_name, source
ORDER BY round, share_dropped DESC, source_name, source;
