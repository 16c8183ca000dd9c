"""Where the time of a training step goes: by phase, by part of the model and by operator.

Backward time is given to the part whose forward made the autograd node.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

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


@contextmanager
def marked(
    models: Sequence[tuple[str, nn.Module]], calls: Sequence[tuple[object, str, str]]
) -> Iterator[None]:
    """Name what a profile shows.

    `models`: parts of each, below a name (empty: none). `calls`: (object, method, name of the phase).
    """
    handles: list[Any] = []
    for prefix, model in models:
        for name, module in model.named_modules():
            label = next((label for pattern, label in _PARTS if re.search(pattern, name)), None)
            if label is not None:
                handles += _mark(module, " ".join(word for word in (prefix, label) if word))
    handles += [_Wrapped(*call) for call in calls]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(module: nn.Module, label: str) -> list[Any]:
    """Name the calls of a module."""
    if hasattr(
        module, "forward_features"
    ):  # timm's ViT is entered by this name, which hooks do not see
        return [_Wrapped(module, "forward_features", label)]
    open_ranges: list[Any] = []

    def enter(_: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        mode = (kwargs or {}).get("mode")
        open_ranges.append(record_function(f"{MARK}{label}{f' {mode}' if mode else ''}"))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave),
    ]


class _Wrapped:
    """A method of one object, its calls named."""

    def __init__(self, owner: object, method: str, label: str) -> None:
        self.owner, self.method = owner, method
        original = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record_function(MARK + label):
                return original(*args, **kwargs)

        setattr(owner, method, wrapped)

    def remove(self) -> None:
        """Give the class's method back."""
        delattr(self.owner, self.method)


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
        return f"backward: {forward_part.get(node, 'other')}", True
    return " > ".join(reversed(labels)) or "other", False


def print_table(title: str, table: dict[str, float], rows: int) -> None:
    """Print the largest `rows` of a table in ms, and their shares."""
    total = sum(table.values())
    print(f"\n{title} (total {total:.0f} ms)")
    for name, spent in list(table.items())[:rows]:
        print(f"  {spent:9.1f} ms {100 * spent / total:5.1f} %  {name}")
