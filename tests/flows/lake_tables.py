"""A lake's tables after one round, made up over a real small world."""

import json
import math
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from flows.quickstart.world import World
from storage import layout
from storage.fingerprint import basis_of
from storage.ids import caption_id
from storage.lake import Lake
from storage.schemas import TABLES, conform
from storage.tables import commit_part

RAW, CLEAN, CAPTIONER, FILTER = ("a" * 32, "b" * 32, "c" * 32, "d" * 32)
BEGAN = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
MARKUP = "<script>alert(1)</script> & red circles"
"""An alt text that must stay text."""


class LakeTables:
    """The raw views of a lake after one round, with made-up numbers over a real small world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self.files: dict[str, Path] = {}
        rng = np.random.default_rng(0)
        for place, row in enumerate(world.truth().to_pylist()):
            if row["pool"] == "web":
                self._add_web(place, row, rng)
        self._add_models()
        self._add_metrics()
        self._add_audit()
        self._add_rules()
        self._add_round()

    def table(self, name: str) -> pa.Table:
        schema = TABLES[name]
        data = [{key: row.get(key) for key in schema.names} for row in self.rows[name]]
        return conform(name, pa.Table.from_pylist(data, schema=schema))

    def connect(self) -> duckdb.DuckDBPyConnection:
        """The tables, in memory, with the views that the report asks."""
        connection = duckdb.connect()
        for name in self.rows:
            connection.register("arrow", self.table(name))
            connection.execute(f"CREATE TABLE {name} AS FROM arrow")
            connection.unregister("arrow")
        connection.execute("CREATE VIEW active_decisions AS FROM decisions")
        for view in ("reserved", "images", "verdicts", "round_costs", "compare_rounds"):
            sql = files("storage").joinpath("sql", f"{view}.sql")
            connection.execute(sql.read_text("utf-8"))
        return connection

    def commit(self, uri: str) -> Lake:
        """The tables as committed parts of a real lake; each picture is a shard of its own."""
        lake = Lake.open(uri, create=True)
        for image_id, file in self.files.items():
            lake.root.write_bytes(layout.shard(image_id), file.read_bytes())
        for name in self.rows:
            rounds = {"captions": 1, "scores": 1, "decisions": 1, "metrics": 1, "rounds": 1}
            rounds |= {"canaries": 1, "judgements": 1, "gate_rules": 1}
            basis = basis_of("test", 1, {}, [])
            part = "blip" if name == "decisions" else "test"
            commit_part(lake, name, part, self.table(name), round=rounds.get(name), basis=basis)
        return lake

    def read_image(self, shard: str, offset: int, size: int) -> bytes:
        return self.files[shard].read_bytes()

    def _add_web(self, place: int, row: dict[str, Any], rng: np.random.Generator) -> None:
        status = {"": "ok", "gone": "http_4xx", "broken": "http_5xx", "slow": "timeout"}
        pair = {
            "key": f"{place:032x}",
            "pool": "web",
            "row": place,
            "source_name": row["source_name"],
            "url": row["url"],
            "alt_text": row["alt_text"],
            "status": status.get(row["fault"], row["fault"]),
            "attempts": 1,
        }
        if not row["fault"]:
            place_in_shard = {"shard": row["image_id"], "offset": 0}
            self.files[row["image_id"]] = self.world.folder / row["image_file"]
            size = self.files[row["image_id"]].stat().st_size
            pair |= {"image_id": row["image_id"], **place_in_shard, "size": size}
            text = MARKUP if place % 17 == 0 else row["alt_text"]
            prob = rng.beta(6, 0.4) if row["alt_text_is_true"] else rng.beta(0.25, 6)
            self._add_text(row["image_id"], "web", text, float(prob))
            said = row["alt_text"] if row["alt_text_is_true"] else "green rings on white"
            self._add_text(row["image_id"], "synthetic", said, float(rng.beta(2, 0.8)))
        self.rows["pairs"].append(pair)

    def _add_text(self, image_id: str, source: str, caption: str, itm_prob: float) -> None:
        ids = {"caption_id": caption_id(image_id, source, caption), "image_id": image_id}
        round = 0 if source == "web" else 1
        text = {"source": source, "caption": caption, "status": "ok", "round": round}
        self.rows["captions"].append({**ids, **text})
        numbers = {"itm_prob": itm_prob, "itc_sim": itm_prob - 0.3, "status": "ok", "round": 1}
        self.rows["scores"].append({**ids, "model_id": FILTER, **numbers})
        kept = itm_prob >= 0.5
        reason = "itm_prob >= 0.5" if kept else f"itm_prob {itm_prob:.4f} < 0.5"
        rule = {"policy": "blip", "params": '{"threshold": 0.5}', "round": 1}
        fate = {"source": source, "kept": kept, "reason": reason}
        self.rows["decisions"].append({**ids, **rule, **fate})

    def _add_models(self) -> None:
        for model_id, role, parent_id, round in (
            (RAW, "med", None, 0),
            (CAPTIONER, "captioner", RAW, 1),
            (FILTER, "filter", RAW, 1),
            (CLEAN, "med", None, 1),
        ):
            origin = {"parent_id": parent_id, "trained_on": "e" * 32, "created_at": BEGAN}
            path = f"models/{model_id}"
            model = {"model_id": model_id, "role": role, "round": round, "path": path}
            self.rows["models"].append({**model, **origin})

    def _add_metrics(self) -> None:
        rng = np.random.default_rng(1)
        for run, model_id, steps, losses in (
            ("pretrain", RAW, 600, ("loss_itc", "loss_itm", "loss_lm")),
            ("retrain", CLEAN, 600, ("loss_itc", "loss_itm", "loss_lm")),
            ("captioner", CAPTIONER, 150, ("loss_lm",)),
            ("filter", FILTER, 150, ("loss_itc", "loss_itm")),
        ):
            for metric in losses:
                start, end = {"loss_itc": (4.2, 1.1), "loss_itm": (0.64, 0.2)}.get(
                    metric, (5.0, 0.5)
                )
                for step in range(20, steps + 1, 20):
                    value = end + (start - end) * math.exp(-step / 150) + rng.normal(0, 0.02)
                    self._measure(model_id, f"train-{run}", metric, value, n=step)
        for metric, before, after in (
            ("mean_recall", 0.168, 0.487),
            ("caption_truth", 0.19, 0.77),
            ("i2t_r1", 0.17, 0.49),
            ("t2i_r1", 0.16, 0.5),
            ("itm_auc_random", 0.992, 0.993),
            ("itm_auc_hard", 0.838, 0.81),
            ("cider", 1.9, 6.2),
        ):
            for model_id, value in ((RAW, before), (CLEAN, after)):
                interval = {} if metric == "cider" else {"low": value - 0.04, "high": value + 0.04}
                self._measure(model_id, "heldout", metric, value, n=500, **interval)

    def _measure(
        self, model_id: str, dataset: str, metric: str, value: float, **more: float
    ) -> None:
        row = {"model_id": model_id, "dataset": dataset, "metric": metric, "value": value}
        self.rows["metrics"].append({"round": 0 if model_id == RAW else 1, **row, **more})

    def _add_audit(self) -> None:
        rng = np.random.default_rng(2)
        shapes = {"true": (9, 1), "random": (1, 9), "hard": (1, 3), "swapped": (2, 2)}
        for number in range(60):
            for kind, shape in shapes.items():
                ids = {"caption_id": f"{number:028x}{kind[:4]}", "image_id": f"{number:032x}"}
                number_of = {"itm_prob": float(rng.beta(*shape)), "itc_sim": 0.1}
                known = {"kind": kind, "truth": kind == "true", "stratum": "short"}
                models = {"model_id": FILTER, "judge_id": FILTER, "caption": "red rings on white"}
                self.rows["canaries"].append({**ids, **number_of, **known, **models, "round": 1})
        for dataset, metric, value in (
            ("canaries", "filter_recall", 0.93),
            ("canaries", "filter_false_keep_swapped", 0.5),
            ("canaries", "noise_left", 0.04),
            ("judge", "judge_agreement", 0.97),
            ("captions", "distinct_share", 0.61),
            ("captions", "self_bleu", 0.52),
        ):
            self._measure(FILTER, dataset, metric, value, n=60, low=value - 0.03, high=value + 0.02)

        for row in self.rows["scores"][::6]:  # the judge thinks otherwise of half of them
            judged = {name: row[name] for name in ("caption_id", "image_id", "itc_sim")}
            likes = abs(row["itm_prob"] - len(self.rows["judgements"]) % 2)
            about = {"source": "web", "model_id": FILTER, "itm_prob": likes, "round": 1}
            self.rows["judgements"].append(judged | about)

    def _add_rules(self) -> None:
        for rule, value, outcome in (
            ("recall_clearly_worse", 0.319, "pass"),
            ("distinct_share_first", None, "not measured"),
            ("matched_share_least", 0.04, "fail"),
        ):
            about = {"rule": rule, "dataset": "heldout", "metric": "mean_recall", "round": 1}
            asked = {"limit": 0.1, "direction": "at_least", "against": "champion"}
            found = {"value": value, "outcome": outcome, "verdict_if_failed": "person"}
            why = f"{rule} <b>in words</b>"
            self.rows["gate_rules"].append({**about, **asked, **found, "why": why})

    def _add_round(self) -> None:
        seconds = {"ingest": 52.1, "pretrain": 131.0, "captioner": 28.4, "filter": 31.9}
        seconds |= {"caption": 22.0, "score": 14.5, "decide": 0.3, "retrain": 129.8}
        settings = {"seed": 0, "decide": {"policy": "blip", "threshold": 0.5}}
        self.rows["rounds"].append(
            {
                "round": 1,
                "status": "promoted",
                "settings": json.dumps(settings),
                "counts": "{}",
                "champion_before": RAW,
                "champion_after": CLEAN,
                "why": "mean_recall 0.4870 of challenger bbbbbbbb is not below 0.1680",
                "started_at": BEGAN,
                "finished_at": BEGAN,
                "seconds": json.dumps(seconds),
                "device_seconds": "{}",
            }
        )
