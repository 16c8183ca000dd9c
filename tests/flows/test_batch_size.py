"""The batch size that a device likes is found by trying, halved when memory runs out, and remembered."""

from pathlib import Path

import pytest
import torch

from flows.batch_size import LARGEST, SMALLEST, BatchSize, fastest, is_out_of_memory
from flows.steps.batches import isolate


def _size(path: Path, setting: object = "auto", model: str = "m") -> BatchSize:
    return BatchSize(setting, path / "sizes.json", {"model": model}, "caption")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds_of", "expected"),
    [
        (lambda n: float(n), SMALLEST),
        (lambda n: 1.0 + n / 8, 128),
        (lambda n: 1.0, LARGEST),
        (lambda n: 1.0 if n <= 64 else n / 64, 64),
    ],
    ids=["no_gain", "overhead", "free", "full_at_64"],
)
def test_fastest_is_the_smallest_size_that_is_about_as_fast_as_any(
    seconds_of: object, expected: int
) -> None:
    assert fastest(seconds_of, LARGEST) == expected  # type: ignore[arg-type]


def test_fastest_stays_below_what_does_not_fit() -> None:
    def seconds_of(count: int) -> float:
        if count > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    assert fastest(seconds_of, LARGEST) == 32


def test_fastest_raises_what_is_no_lack_of_memory() -> None:
    def seconds_of(count: int) -> float:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fastest(seconds_of, LARGEST)


def test_measured_size_is_remembered_for_the_same_model_only(tmp_path: Path) -> None:
    size = _size(tmp_path)
    assert not size.is_known
    assert size.images == SMALLEST
    size.settle(lambda count: 1.0 if count <= 64 else float(count))
    assert size.images == 64
    again = _size(tmp_path)
    assert (again.is_known, again.images) == (True, 64)
    assert not _size(tmp_path, model="other").is_known
    assert _size(tmp_path, setting=16).images == 16


def test_batch_that_did_not_fit_is_halved_for_this_run_and_the_next(tmp_path: Path) -> None:
    size = _size(tmp_path, setting=64)
    capacity, tried = 12, []

    def work(rows: list[int]) -> list[int]:
        tried.append(len(rows))
        if len(rows) > capacity:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return rows

    rows = list(range(64))
    assert isolate(work, rows, size.ran_out) == rows
    assert size.images == 8
    assert _size(tmp_path, setting=64).images == 8
    tried.clear()
    for start in range(0, 64, size.images):
        isolate(work, rows[start : start + size.images], size.ran_out)
    assert set(tried) == {8}, "what was learned is used"


def test_damaged_memory_of_sizes_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text("{", encoding="utf-8")
    size = _size(tmp_path)
    size.settle(lambda count: 1.0 if count <= 16 else float(count))
    assert _size(tmp_path).images == 16


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory_knows_what_a_smaller_batch_may_cure(
    error: Exception, expected: bool
) -> None:
    assert is_out_of_memory(error) is expected
