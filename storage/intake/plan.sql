-- What is to be done with each row of a URL list. Rows that the lake has from an earlier round
-- (same source, URL and text) are left out; every other row gets a number n, and a status when
-- there is nothing to fetch.
--
-- Reads listed (row, key, source_name, url, fetch_url, alt_text, licence, extra, bad_text,
-- bad_url) and known (key, url), the web pairs of other rounds.
CREATE TEMP TABLE plan AS
WITH news AS (
    SELECT * FROM listed l WHERE NOT EXISTS (SELECT 1 FROM known k WHERE k.key = l.key)
),
fetchable AS (
    -- The first row of each URL is the one that is fetched.
    SELECT fetch_url, min(row) AS first_row
    FROM news
    WHERE bad_text IS NULL AND bad_url IS NULL
    GROUP BY fetch_url
),
known_urls AS (
    SELECT DISTINCT url FROM known WHERE url IS NOT NULL
)
SELECT
    row_number() OVER (ORDER BY n.row) - 1 AS n,
    n.row, n.key, n.source_name, n.url, n.fetch_url, n.alt_text, n.licence, n.extra,
    CASE
        WHEN n.bad_text IS NOT NULL THEN 'bad_text'
        WHEN n.bad_url IS NOT NULL THEN 'bad_url'
        WHEN k.url IS NOT NULL THEN 'duplicate_url'
        WHEN f.first_row < n.row THEN 'duplicate_url'
    END AS status,
    CASE
        WHEN n.bad_text IS NOT NULL THEN n.bad_text
        WHEN n.bad_url IS NOT NULL THEN n.bad_url
        WHEN k.url IS NOT NULL THEN 'in the lake already, with another text or source'
        WHEN f.first_row < n.row THEN 'same address as row ' || f.first_row
    END AS reason
FROM news n
LEFT JOIN fetchable f ON f.fetch_url = n.fetch_url
LEFT JOIN known_urls k ON k.url = n.url
