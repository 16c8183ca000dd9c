-- Every purge: what was asked for and why, how much went, which models had been trained on it.
CREATE OR REPLACE VIEW purges AS
SELECT
    purge_id,
    any_value(purged_at)                                                   AS purged_at,
    any_value(because)                                                     AS because,
    string_agg(DISTINCT asked, ', ' ORDER BY asked)
        FILTER (WHERE asked NOT LIKE 'the %')                              AS asked,
    count(*)                                                               AS rows,
    count(DISTINCT image_id)                                               AS images,
    CAST(coalesce(sum(size), 0) AS BIGINT)                                 AS bytes,
    list_sort(list_distinct(flatten(list(from_json(models, '["VARCHAR"]'))))) AS models
FROM purged
GROUP BY purge_id
ORDER BY purged_at, purge_id;
