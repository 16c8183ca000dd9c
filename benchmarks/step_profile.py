"""Where the time of a training step goes: by phase, by part of the model and by operator.

Backward time is given to the part whose forward made the autograd node.

Dimension key: L text tokens, P image tokens, D width.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from blip_core.config import MEDConfig

MARK = "@"
_PARTS = (
    (r"(^|\.)vision$", "vision"),
    (r"vision\.patch_embed$", "patches"),
    (r"vision\.blocks\.\d+\.attn$", "attention"),
    (r"vision\.blocks\.\d+\.mlp$", "feed-forward"),
    (r"vision\.(blocks\.\d+\.)?norm\d?$", "norm"),
    (r"(^|\.)text$", "text"),
    (r"text\.layers\.\d+\.(encoder|decoder)_attention$", "self-attention"),
    (r"text\.layers\.\d+\.cross_attention$", "cross-attention"),
    (r"text\.layers\.\d+\.cross_attention\.kv$", "image keys and values"),
    (r"text\.layers\.\d+\.feed_forward$", "feed-forward"),
    (r"lm_head$", "lm head"),
)


def flops_per_image(
    config: MEDConfig, *, tokens: int, shared_kv: bool = True, lm_rows: float | None = None
) -> dict[str, float]:
    """Matrix-product FLOPs of one pretraining step for one image, forward and backward, by part.

    A multiply and an add are two. `tokens` is what texts are padded to, `lm_rows` the tokens an image
    that reach the LM head (default: all). `shared_kv`: cross-attention's keys and values once an image
    instead of once in each of the four passes that read them.
    """
    vision, text = config.vision, config.text
    patches, width, length = vision.num_tokens, vision.width, tokens
    block = (8 + 4 * vision.mlp_ratio) * width**2 * patches + 4 * patches**2 * width
    embed = 2 * (patches - 1) * 3 * vision.patch_size_px**2 * width
    image = vision.depth * block + embed
    attention = 8 * text.width**2 * length + 4 * length**2 * text.width
    feed_forward = 4 * text.width * text.ffn_width * length
    cross = 4 * text.width**2 * length + 4 * length * patches * text.width
    kv = text.depth * 4 * patches * text.encoder_width * text.width
    plain = text.depth * (attention + feed_forward)
    fused = plain + text.depth * cross
    rows = length if lm_rows is None else lm_rows
    return {
        "vision": 3 * image,
        "vision twin": image,
        "text": 3 * plain,
        "text twin": plain,
        "matching (3 rows)": 9 * fused,
        "language modelling": 3 * fused,
        "image keys and values": 3 * kv * (1 if shared_kv else 4),
        "lm head": 3 * rows * (2 * text.width**2 + 2 * text.width * text.vocab_size),
    }


@contextmanager
def marked(*models: tuple[str, nn.Module | None]) -> Iterator[None]:
    """Name the parts of models in profiles, below a name each (empty: none)."""
    handles = []
    for prefix, model in models:
        for name, module in model.named_modules() if model is not None else ():
            label = next((label for pattern, label in _PARTS if re.search(pattern, name)), None)
            if label is not None:
                handles += _mark(module, " ".join(word for word in (prefix, label) if word))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(module: nn.Module, label: str) -> list[Any]:
    open_ranges: list[Any] = []
    original = getattr(module, "forward_features", None)

    def enter(_: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        mode = (kwargs or {}).get("mode")
        open_ranges.append(record_function(f"{MARK}{label}{f' {mode}' if mode else ''}"))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    if original is not None:  # timm's ViT is entered by this name, which hooks do not see

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record_function(MARK + label):
                return original(*args, **kwargs)

        module.forward_features = wrapped  # type: ignore[assignment, method-assign]
        return [_Undo(module)]
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]


class _Undo:
    """Take a wrapped `forward_features` off again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def remove(self) -> None:
        """Give the class's method back."""
        del self.module.forward_features


def phase(name: str) -> record_function:
    """Return a context that names a phase of the step."""
    return record_function(f"{MARK}{name}")


def profile_step(step: Callable[[], object], *, cuda: bool) -> dict[str, dict[str, float]]:
    """Run `step` once; returns milliseconds of self time `by part`, `by op` and `by part and op`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as prof:
        step()
        if cuda:
            torch.cuda.synchronize()
    events = [event for event in prof.events() if event.device_type.name == "CPU"]
    forward_part: dict[int, str] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            part, is_backward = _part(event, {})
            if not is_backward:
                forward_part[event.sequence_nr] = part
    tables: dict[str, dict[str, float]] = {
        name: defaultdict(float) for name in ("by part", "by op", "by part and op")
    }
    for event in events:
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        if spent <= 0:
            continue
        part, _ = _part(event, forward_part)
        name = "(python)" if event.name.startswith(MARK) else event.name
        tables["by part"][part] += spent
        tables["by op"][name] += spent
        tables["by part and op"][f"{part} | {name}"] += spent
    return {name: dict(sorted(t.items(), key=lambda x: -x[1])) for name, t in tables.items()}


def _part(event: Any, forward_part: dict[int, str]) -> tuple[str, bool]:
    """Return the marked ranges around an event, outermost first, and whether it is in backward."""
    labels: list[str] = []
    node: int | None = None
    while event is not None:
        if event.name.startswith(MARK):
            labels.append(event.name[len(MARK) :])
        elif event.name.startswith("autograd::engine::evaluate_function") and node is None:
            node = event.sequence_nr
        event = event.cpu_parent
    if node is not None:
        return f"backward: {forward_part.get(node, 'other').removeprefix('forward > ')}", True
    return " > ".join(reversed(labels)) or "other", False


def print_table(title: str, table: dict[str, float], rows: int) -> None:
    """Print the largest `rows` of a table in ms, and their shares."""
    total = sum(table.values())
    print(f"\n{title} (total {total:.0f} ms)")
    for name, spent in list(table.items())[:rows]:
        print(f"  {spent:9.1f} ms {100 * spent / total:5.1f} %  {name}")
