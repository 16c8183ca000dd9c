-- Questions with a blank to fill in: FROM kept(1), FROM texts_of('0c81...'), FROM changed(1, 'blip-8345...', 'top_k-a7a3...').
CREATE OR REPLACE MACRO kept(a_round) AS TABLE
    SELECT * EXCLUDE (kept) FROM verdicts WHERE kept AND round = a_round;

CREATE OR REPLACE MACRO dropped(a_round) AS TABLE
    SELECT * EXCLUDE (kept) FROM verdicts WHERE NOT kept AND round = a_round;

-- All that was proposed for one image, with every number and every decision.
CREATE OR REPLACE MACRO texts_of(an_image) AS TABLE
    SELECT caption_id, source, caption, round, itm_prob, itc_sim, policy, generation, kept, reason
    FROM why WHERE image_id = an_image AND caption_id IS NOT NULL
    ORDER BY source DESC, caption_id, round, generation;

-- The texts that two sets of decisions of one round disagree on.
CREATE OR REPLACE MACRO changed(a_round, one, other) AS TABLE
    SELECT
        a.caption_id, a.image_id, a.source,
        a.kept AS kept_by_one, b.kept AS kept_by_other, a.reason AS reason_of_one, b.reason AS reason_of_other
    FROM decisions a
    JOIN decisions b USING (caption_id)
    WHERE a.round = a_round AND b.round = a_round AND a.generation = one AND b.generation = other AND a.kept <> b.kept
    ORDER BY a.source DESC, a.caption_id;

-- Texts whose itm_prob is within a distance of a number: where a threshold cuts.
CREATE OR REPLACE MACRO borderline(a_round, a_threshold, distance) AS TABLE
    SELECT round, source, source_name, itm_prob, kept, caption, caption_id, image_id
    FROM verdicts
    WHERE round = a_round AND itm_prob BETWEEN a_threshold - distance AND a_threshold + distance
    ORDER BY abs(itm_prob - a_threshold), caption_id;
