"""`rounds`, `compare-rounds`, `promote`, `rollback` as a user types them, on a lake of a real cycle."""

import csv
import io
import json
from pathlib import Path

from cycle import FinishedCycle, bootstrap, copied, drop_later_rounds

from storage import (
    Lake,
    basis_of,
    commit_part,
    drop_part,
    layout,
    list_parts,
    query,
    read_part,
    registry,
)


def test_round_commands_show_and_change_the_champion(
    finished: FinishedCycle, tmp_path: Path
) -> None:
    cycle = copied(finished, tmp_path)
    drop_later_rounds(cycle.lake)
    lake = Lake.open(str(cycle.lake))
    champion = lake.root.read_bytes(layout.CHAMPION)
    first = [entry for entry in json.loads(champion)["history"] if entry["round"] < 2]
    lake.root.write_bytes(layout.CHAMPION, json.dumps({"history": first}).encode())

    def run(*arguments: str, status: int = 0) -> str:
        done = bootstrap(*arguments, "--lake", str(cycle.lake), cwd=tmp_path, COLUMNS="200")
        assert done.returncode == status, done.stdout[-1500:] + done.stderr[-1500:]
        return done.stdout + done.stderr

    shown = run("rounds")
    assert "promoted" in shown
    assert "mean_recall" in shown
    rules = list(csv.DictReader(io.StringIO(run("rounds", "1", "--format", "csv"))))
    assert {rule["rule"]: rule["outcome"] for rule in rules}["recall_clearly_worse"] == "pass"
    of_round = run("rounds", "1")
    assert "not measured: " in of_round, "sixteen human pictures are too few for a panel"
    assert "retrain" in of_round, "what it cost"
    for part in list_parts(lake, "gate_rules", 1):
        kept = read_part(lake, part)
        drop_part(lake, part)
        assert "no rules: " in run("rounds", "1"), "as in a lake of an older version"
        basis = basis_of("gate", 1, {}, [])
        commit_part(lake, "gate_rules", part.name, kept, round=1, basis=basis)
    (compared,) = json.loads(run("compare-rounds", "--format", "json"))
    assert compared["recall_gain_low"] <= compared["recall_gain"] <= compared["recall_gain_high"]
    costs = query(lake, "SELECT sum(seconds) AS s, sum(device_seconds) AS d FROM round_costs")
    assert compared["seconds"] == costs.to_pylist()[0]["s"]
    assert compared["seconds_per_kept"] == compared["seconds"] / compared["kept"]
    assert 0 < compared["device_seconds"] < compared["seconds"]
    assert "seconds_per_kept" in run("compare-rounds")

    assert "has no round 8" in run("promote", "8", "--because", "why not", status=2)
    assert "has no round 8" in run("rounds", "8", status=2)
    assert "needs a reason" in run("rollback", "0", "--because", "", status=2)
    run("rollback", "0", "--because", "to see")
    pretrained = registry.find(lake, "med", 0)
    assert registry.champion(lake) == pretrained
    shown = run("rounds")
    assert "rolled back by hand to round 0: to see; before that promoted: mean_recall" in shown
    run("rollback", "1", "--because", "seen")
    assert registry.champion(lake) == registry.find(lake, "med", 1)
