"""A MED trained on photographs from pretrained parts, against a probe of the same parts left as they are.

The start is a DINOv2 ViT-S/14, frozen and run once over the images, and MiniLM's BERT. One run trains in
three phases, whose best models the dev split chooses, and then looks once at 500 images of the test split, on
which the probe is measured too. A killed run goes on where it was when the same command is given again.

    python benchmarks/photos_training.py --photos DIR --weights DIR --text DIR --out DIR \\
        [--json PATH] [--svg PATH] [--quick]

DIR of --photos holds images/ and captions.json ({image, split, captions}); DIR of --weights a timm ViT-S/14
file; DIR of --text a BERT folder of width 384 (see docs/results/photos_training.md).
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from curve_svg import draw_curves
from photo_figures import (
    MAX_TEXT_TOKENS,
    fitted_probes,
    held_out,
    measured_captions,
    measured_pairs,
    values_of,
)
from photo_pairs import PairFeed, Split, encoded_split, read_records

from blip_core import (
    MED,
    MEDConfig,
    MEDTokenizer,
    Metric,
    TrainConfig,
    TrainLog,
    build_model,
    evaluate_itm,
    evaluate_retrieval,
    init_from_bert,
    load_timm_weights,
    save_model,
    train,
)
from blip_core.dev_losses import dev_losses

NUM_TEST = 500
IMAGE_SIZE_PX = 168
TEXT_DEPTH = 6
RERANK_K = 8
COMMON: dict[str, Any] = {
    "min_learning_rate": 1e-6,
    "adam_beta2": 0.98,
    "queue_size": 0,
    "distill_alpha": 0.0,
    "momentum": 0.5,
    "max_text_tokens": MAX_TEXT_TOKENS,
    "dtype": "bfloat16",
    "freeze": ("vision",),
    "log_every_steps": 10,
    "checkpoint_every_steps": 50,
    "best_mode": "max",
    "keep_checkpoints": 1,
}
PHASES: dict[str, dict[str, Any]] = {
    "align": {
        "objectives": ("itc",),
        "steps": 200,
        "batch_size": 256,
        "learning_rate": 2e-4,
        "fresh_lr_scale": 5.0,
        "warmup_steps": 20,
        "best_metric": "mean_recall",
        "evaluate_every_steps": 100,
    },
    "match": {
        "objectives": ("itc", "itm"),
        "steps": 150,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "fresh_lr_scale": 10.0,
        "warmup_steps": 10,
        "hard_negatives_ramp_steps": 400,
        "best_metric": "reranked_mean_recall",
        "evaluate_every_steps": 150,
    },
    "all": {
        "objectives": ("itc", "itm", "lm"),
        "steps": 150,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "fresh_lr_scale": 10.0,
        "warmup_steps": 10,
        "hard_negatives_ramp_steps": 400,
        "best_metric": "reranked_mean_recall",
        "evaluate_every_steps": 150,
    },
}
"""Each phase starts from the best model of the one before. Contrasting alone is cheap, so most pairs go there;
captioning comes last, because a step with it costs half as much again."""


@dataclass(slots=True)
class Clock:
    """Wall and process CPU seconds of the parts of a run, kept in a file: a resumed run adds to them."""

    path: Path

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Append what the `with` took."""
        wall, cpu = time.time(), time.process_time()
        try:
            yield
        finally:
            line = {"part": part, "wall_s": time.time() - wall, "cpu_s": time.process_time() - cpu}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def parts(self) -> dict[str, dict[str, float]]:
        """Return the sums of every part."""
        sums: dict[str, dict[str, float]] = {}
        for line in map(json.loads, self.path.read_text(encoding="utf-8").splitlines()):
            part = sums.setdefault(line["part"], {"wall_s": 0.0, "cpu_s": 0.0})
            for name in part:
                part[name] += line[name]
        return sums


def start_model(options: argparse.Namespace, config: MEDConfig) -> tuple[MED, MEDTokenizer]:
    """Return the model before its first step: DINOv2's vision, MiniLM's text, random heads."""
    tokenizer = MEDTokenizer.from_pretrained(options.text)
    model = build_model(config, seed=options.seed)
    load_timm_weights(model.vision, next(iter(sorted(options.weights.glob("*.safetensors")))))
    init_from_bert(model.text, options.text, lm_head=model.lm_head)
    quiet_start(model, tokenizer)
    return model.eval(), tokenizer


@torch.no_grad()
def quiet_start(model: MED, tokenizer: MEDTokenizer) -> None:
    """Let the image-grounded modes start as nearly what BERT computes.

    A random cross-attention with a norm of its own is noise between BERT's layers: where texts were read
    with an image, the vector at the first token had a cosine of .1 to .4 with that of the text alone, and
    after this .96 or more. The norm after cross-attention gets the mean size of what comes in, cross-attention
    starts at a tenth of its output, and [ENC] and [DEC], which BERT does not know, start as [CLS].
    """
    words = model.text.word_embeddings.weight
    words[[tokenizer.enc_id, tokenizer.dec_id]] = words[tokenizer.cls_id].clone()
    for layer in model.text.stack():
        cross, before = layer.cross_attention, layer.encoder_attention.norm
        cross.output.weight.mul_(0.1)
        cross.norm.bias.fill_(before.bias.mean())
        cross.norm.weight.fill_((before.weight.square().mean() + before.bias.var()).sqrt())


def small_config(options: argparse.Namespace) -> MEDConfig:
    """Return the preset `small_dinov2` with the image side and text layers of this run."""
    config = MEDConfig.preset("small_dinov2", image_size_px=options.image_size)
    text = dataclasses.replace(config.text, depth=options.text_depth, dropout=options.dropout)
    return dataclasses.replace(config, text=text)


def dev_evaluation(
    tokenizer: MEDTokenizer, dev: Split, config: TrainConfig
) -> Callable[[MED, int], dict[str, float]]:
    """Return what judges a model in training: recalls of all dev texts, matching on one text an image."""
    thin = Split(dev.names, [texts[:1] for texts in dev.captions], dev.tokens)
    size = min(100, len(dev.names))
    feed = PairFeed(dev, tokenizer, batch_size=size, max_tokens=MAX_TEXT_TOKENS, seed=0)
    batches = [feed(number) for number in range(min(2, feed.per_epoch))]

    def evaluate(model: MED, step: int) -> dict[str, float]:
        pairs = held_out(model, tokenizer, dev)
        numbers = values_of(evaluate_retrieval(model, tokenizer, pairs))
        if "itm" in config.objectives:
            pairs = held_out(model, tokenizer, thin)
            ranked = evaluate_retrieval(model, tokenizer, pairs)
            numbers["thin_mean_recall"] = values_of(ranked)["mean_recall"]
            ranked = evaluate_retrieval(model, tokenizer, pairs, rerank_k=8)
            numbers["reranked_mean_recall"] = values_of(ranked)["mean_recall"]
            numbers |= values_of(evaluate_itm(model, tokenizer, pairs))
        return numbers | dev_losses(model, tokenizer, batches, config, vision_frozen=True)

    return evaluate


def run_phases(
    options: argparse.Namespace,
    model: MED,
    tokenizer: MEDTokenizer,
    splits: dict[str, Split],
    clock: Clock,
) -> dict[str, dict[str, Any]]:
    """Train phase after phase, each from the best of the one before; returns how each went."""
    results = {}
    for number, (name, phase) in enumerate(options.phases.items()):
        config = TrainConfig(seed=options.seed + number, **{**COMMON, **phase})
        feed = PairFeed(
            splits["train"],
            tokenizer,
            batch_size=config.batch_size,
            max_tokens=config.max_text_tokens,
            seed=config.seed,
        )
        evaluate = dev_evaluation(tokenizer, splits["dev"], config)

        def timed(model: MED, step: int, evaluate: Any = evaluate) -> dict[str, float]:
            with clock.time("dev evaluation"):
                numbers: dict[str, float] = evaluate(model, step)
            shown = {key: round(value, 4) for key, value in numbers.items()}
            print(json.dumps({"step": step} | shown), flush=True)
            return numbers

        with clock.time(f"phase {name}, dev evaluation included"):
            result = train(
                model,
                tokenizer,
                feed,
                config,
                options.out / name,
                on_log=show,
                evaluate=timed,
            )
        results[name] = {
            "config": dataclasses.asdict(config),
            "steps": result.steps,
            "best_step": result.best_step,
            "best_value": result.best_value,
            "warned": [dataclasses.asdict(each) for each in result.warned],
            "history": result.history,
        }
    return results


def show(log: TrainLog) -> None:
    """Print a line of the history."""
    values = dataclasses.asdict(log)
    names = ("step", "loss_itc", "loss_itm", "loss_lm", "grad_norm", "scale", "images_per_s")
    known = {name: values[name] for name in names if values.get(name) is not None}
    clocks = {"minutes": round(time.time() / 60 % 10_000, 2), "cpu_s": round(time.process_time())}
    rounded = {name: round(value, 4) for name, value in known.items()}
    print(json.dumps(rounded | clocks), flush=True)


def run(options: argparse.Namespace, config: MEDConfig) -> dict[str, Any]:
    """Train, measure, and return everything that the page needs."""
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.out / "times.jsonl")
    model, tokenizer = start_model(options, config)
    splits = {}
    limits = {"train": options.train, "dev": None, "test": NUM_TEST}
    if options.until == "dev":
        del limits["test"]
    for name, limit in limits.items():
        records = read_records(options.photos, name, 16 if options.quick else limit)
        with clock.time("vision tokens"):
            path = options.out / f"tokens-{name}.npy"
            splits[name] = encoded_split(model, options.photos, records, path)
    with clock.time("probe"):
        probes = fitted_probes(model, tokenizer, splits, options.out)
    phases = run_phases(options, model, tokenizer, splits, clock)
    save_model(model, tokenizer, options.out / "final")
    with clock.time("evaluation"):
        split = splits[options.until]
        metrics = measured_pairs(
            model, tokenizer, split, probes(options.until), rerank_k=options.rerank_k
        )
        found, captions = measured_captions(
            options.photos, model, tokenizer, split, options.captions
        )
        metrics["captions"] = found
    return {
        "split": options.until,
        "metrics": {
            title: [_plain(metric) for metric in found] for title, found in metrics.items()
        },
        "captions": captions,
        "phases": phases,
        "times": clock.parts(),
    }


def summary(result: dict[str, Any]) -> str:
    """Return the figures as markdown: one row a metric, 95 % intervals in brackets."""
    lines = [f"| {result['split']} images | figure | 95 % |", "|---|---|---|"]
    for title, metrics in result["metrics"].items():
        for metric in metrics:
            interval = f"{metric['low']:.3f} to {metric['high']:.3f}"
            lines.append(f"| {title}: {metric['name']} | {metric['value']:.3f} | {interval} |")
    lines += ["", "| part | wall, minutes | CPU, minutes |", "|---|---|---|"]
    for part, spent in result["times"].items():
        lines.append(f"| {part} | {spent['wall_s'] / 60:.1f} | {spent['cpu_s'] / 60:.1f} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("photos", "weights", "text"):
        made.add_argument(f"--{name}", type=Path, required=True)
    made.add_argument("--out", type=Path, default=Path("lakes/photos_training"))
    made.add_argument("--json", type=Path)
    made.add_argument("--svg", type=Path, help="where the curves are drawn")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--train", type=int, help="use only so many train images")
    made.add_argument("--image-size", type=int, default=IMAGE_SIZE_PX)
    made.add_argument("--text-depth", type=int, default=TEXT_DEPTH)
    made.add_argument("--dropout", type=float, default=0.1)
    made.add_argument("--rerank-k", type=int, default=RERANK_K)
    made.add_argument("--captions", type=int, default=200, help="images that are captioned")
    made.add_argument(
        "--until", choices=("dev", "test"), default="test", help="dev: never look at the test split"
    )
    made.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        help="phase.field=JSON, such as all.steps=100; phase=null leaves a phase out",
    )
    made.add_argument("--quick", action="store_true", help="16 images a split, four steps a phase")
    return made


def with_overrides(phases: dict[str, dict[str, Any]], overrides: list[str]) -> dict[str, Any]:
    """Return phases with `phase.field=JSON` laid over them."""
    changed = {name: dict(phase) for name, phase in phases.items()}
    for override in overrides:
        where, _, value = override.partition("=")
        name, _, field = where.partition(".")
        if not field and json.loads(value) is None:
            del changed[name]
        else:
            found = json.loads(value)
            changed[name][field] = tuple(found) if isinstance(found, list) else found
    return changed


def _plain(metric: Metric) -> dict[str, Any]:
    """A metric without its resamples, for JSON."""
    return {k: v for k, v in dataclasses.asdict(metric).items() if k != "resamples"}


def main() -> None:
    """Run, print the figures, and write what was asked for."""
    options = parser().parse_args()
    options.phases = with_overrides(PHASES, options.overrides)
    if options.quick:
        for phase in options.phases.values():
            phase |= {"steps": 4, "batch_size": 8, "evaluate_every_steps": 2, "warmup_steps": 1}
    result = run(options, small_config(options))
    print(summary(result))
    print(f"load average {os.getloadavg()}, threads {torch.get_num_threads()}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    if options.svg:
        options.svg.write_text(draw_curves(result["phases"]), encoding="utf-8")


if __name__ == "__main__":
    main()
