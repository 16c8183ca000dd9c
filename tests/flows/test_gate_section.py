"""The table of rules in the settings: laid over the built-in one, refused where it makes no sense, in a round's basis."""

import pytest

from flows.errors import SettingsError
from flows.gate_section import DEFAULT_RULES, GateSettings
from flows.settings import load_settings

OWN = {
    "dataset": "heldout",
    "metric": "cider",
    "against": "champion",
    "limit": -0.05,
    "if_failed": "refuse",
}


def test_rules_are_changed_field_by_field_and_taken_away_by_name() -> None:
    settings = load_settings(
        overrides=[
            "gate.rules.distinct_share_last.limit=0.5",
            "gate.rules.vocabulary_first=null",
        ],
        changes={"gate": {"rules": {"cider_kept": OWN}}},
    )
    table = settings.gate.table
    assert set(table) == {*DEFAULT_RULES, "cider_kept"} - {"vocabulary_first"}
    assert table["distinct_share_last"].limit == 0.5
    assert table["distinct_share_last"].if_failed == "person", "as it was built in"
    again = settings.with_changes({"seed": 7})
    assert again.gate == settings.gate


def test_max_recall_drop_is_taken_from_the_limits_of_recall_alone() -> None:
    plain, lenient = (GateSettings(max_recall_drop=drop).table for drop in (0.0, 0.05))
    for name, rule in plain.items():
        lowered = 0.05 if name.startswith("recall_") else 0.0
        assert lenient[name].limit == pytest.approx(rule.limit - lowered)


def test_basis_of_a_round_holds_changed_rules_only() -> None:
    assert load_settings().as_basis()["gate"] == {"max_recall_drop": 0.0}, "as in older lakes"
    changed = load_settings(overrides=["gate.rules.length_last=null"]).as_basis()["gate"]
    assert changed == {"max_recall_drop": 0.0, "rules": {"length_last": None}}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"lenght_last": None}, "lenght_last: no such rule to take away; there is length_last"),
        ({"x": {"limit": 1}}, r"gate\.rules\.x\.metric: Field required"),
        ({"length_last": {"limt": 1}}, r"gate\.rules\.length_last\.limt: no such setting"),
        ({"x": OWN | {"against": "nothing"}}, "compared as value"),
        ({"x": OWN | {"compare": "ratio", "end": "low"}}, "only values and differences"),
        ({"x": OWN | {"dataset": "captions"}}, "give first or last"),
        ({"x": OWN | {"if_failed": "explode"}}, "'refuse' or 'person'"),
        (7, "valid dictionary"),
    ],
)
def test_rule_that_makes_no_sense_is_refused_with_its_name(rules: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(changes={"gate": {"rules": rules}})
