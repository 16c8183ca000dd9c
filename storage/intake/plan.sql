-- What is to be done with each row of a URL list. Rows that the lake has from an earlier round
-- (same source, URL and text) are left out, unless they failed in a way that may pass, fewer than $again
-- times in vain since; every other row gets a number n, and a status when there is nothing to fetch.
--
-- Reads listed (row, key, source_name, url, fetch_url, alt_text, licence, extra, bad_text,
-- bad_url, address, host), known (key, url, status, reason, image_id), the web pairs of other rounds, purged,
-- placeholders (form), texts that are of no image, and the macro may_pass(status, reason).
-- Of a row that is not fetched because its address or its host was purged, no text is kept. A duplicate_url
-- says which image its address had, or which row of the list is the first of it.
CREATE TEMP TABLE plan AS
WITH purged_addresses AS (
    SELECT address, min(because) AS because FROM purged WHERE address IS NOT NULL GROUP BY address
),
purged_hosts AS (
    SELECT substr(asked, 6) AS host, min(because) AS because
    FROM purged WHERE starts_with(asked, 'host ') GROUP BY ALL
),
hosts AS (
    SELECT l.host, min(h.because) AS because
    FROM (SELECT DISTINCT host FROM listed WHERE host IS NOT NULL) l
    JOIN purged_hosts h ON l.host = h.host OR ends_with(l.host, '.' || h.host)
    GROUP BY l.host
),
known_rows AS (
    SELECT key,
        count(*) FILTER (may_pass(status, reason)) AS in_vain,
        count(*) FILTER (status <> 'duplicate_url' AND NOT may_pass(status, reason)) > 0 AS is_settled
    FROM known GROUP BY key
),
news AS (
    SELECT l.*, coalesce(a.because, h.because) AS purged_because, r.key IS NOT NULL AS is_again
    FROM listed l
    LEFT JOIN known_rows r USING (key)
    LEFT JOIN purged_addresses a USING (address)
    LEFT JOIN hosts h USING (host)
    WHERE r.key IS NULL OR (NOT r.is_settled AND r.in_vain BETWEEN 1 AND $again)
),
fetchable AS (
    -- The first row of each URL is the one that is fetched.
    SELECT fetch_url, min(row) AS first_row
    FROM news
    WHERE bad_text IS NULL AND bad_url IS NULL AND purged_because IS NULL
    GROUP BY fetch_url
),
known_urls AS (
    SELECT url, min(image_id) FILTER (status IN ('ok', 'duplicate_image', 'duplicate_url')) AS image_id
    FROM known WHERE url IS NOT NULL GROUP BY url
    HAVING count(*) FILTER (status <> 'duplicate_url' AND NOT may_pass(status, reason)) > 0
)
SELECT
    row_number() OVER (ORDER BY n.row) - 1 AS n,
    n.row, n.key, n.source_name, n.url, n.fetch_url,
    CASE WHEN n.purged_because IS NULL THEN n.alt_text END AS alt_text,
    CASE WHEN n.purged_because IS NULL THEN n.licence END AS licence,
    CASE WHEN n.purged_because IS NULL THEN n.extra END AS extra,
    CASE
        WHEN n.purged_because IS NOT NULL THEN 'purged'
        WHEN n.bad_text IS NOT NULL THEN 'bad_text'
        WHEN n.bad_url IS NOT NULL THEN 'bad_url'
        WHEN k.url IS NOT NULL THEN 'duplicate_url'
        WHEN f.first_row < n.row THEN 'duplicate_url'
    END AS status,
    CASE
        WHEN n.purged_because IS NOT NULL THEN n.purged_because
        WHEN n.bad_text IS NOT NULL THEN n.bad_text
        WHEN n.bad_url IS NOT NULL THEN n.bad_url
        WHEN k.url IS NOT NULL THEN 'in the lake already, with another text or source'
        WHEN f.first_row < n.row THEN 'same address as row ' || f.first_row
    END AS reason,
    k.image_id AS known_image,
    CASE WHEN k.url IS NULL AND f.first_row < n.row THEN f.first_row END AS first_row,
    h.form IS NOT NULL AS is_placeholder,
    n.is_again
FROM news n
LEFT JOIN fetchable f ON f.fetch_url = n.fetch_url
LEFT JOIN known_urls k ON k.url = n.url
LEFT JOIN placeholders h ON h.form = form_of(n.alt_text)
