import pytest
import torch

from blip_core.distributed import World
from blip_core.negatives import admissible_negatives, draw_negatives, sample_hard_negatives


def test_admissible_negatives_leave_out_same_image_and_same_text() -> None:
    admissible = admissible_negatives(torch.tensor([1, 1, 2, 3]), torch.tensor([7, 8, 7, 9]))
    assert admissible.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]


def test_sample_hard_negatives_never_takes_an_inadmissible_column() -> None:
    torch.manual_seed(0)
    ids, texts = torch.tensor([1, 1, 2, 3, 4, 5]), torch.tensor([1, 2, 1, 4, 5, 5])
    admissible = admissible_negatives(ids, texts)
    sim = 10 * torch.eye(6)  # the true pair is by far the most similar
    for _ in range(200):
        columns, has_one = sample_hard_negatives(sim, admissible)
        assert has_one.all()
        assert admissible[torch.arange(6), columns].all()


def test_sample_hard_negatives_prefers_the_similar() -> None:
    torch.manual_seed(0)
    sim = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    admissible = ~torch.eye(3, dtype=torch.bool)
    drawn = torch.stack([sample_hard_negatives(sim, admissible)[0] for _ in range(400)])
    assert (drawn[:, 0] == 1).float().mean() > 0.9
    assert 0.35 < (drawn[:, 1] == 0).float().mean() < 0.65


def test_sample_hard_negatives_marks_rows_without_one() -> None:
    columns, has_one = sample_hard_negatives(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    assert (columns.tolist(), has_one.tolist()) == ([0], [False])


@pytest.mark.parametrize(("hardness", "share"), [(0.0, 1 / 3), (1.0, 1.0)])
def test_draw_negatives_goes_from_even_draws_to_the_most_similar(
    hardness: float, share: float
) -> None:
    ids = torch.arange(4)
    sim = torch.zeros(4, 4)
    sim[:, 0], sim[0, 1] = 20.0, 20.0
    torch.manual_seed(0)
    drawn = [
        draw_negatives(
            sim,
            sim,
            ids,
            ids,
            hardness=hardness,
            world=World(),
            from_all_ranks=False,
            generator=None,
        )
        for _ in range(300)
    ]
    for side in ("images", "texts"):
        columns = torch.stack([getattr(each, side) for each in drawn])
        hits = (columns == torch.tensor([1, 0, 0, 0])).float().mean()
        assert float(hits) == pytest.approx(share, abs=0.06)
