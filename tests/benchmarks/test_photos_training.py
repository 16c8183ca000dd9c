"""The training on photographs runs from end to end in tiny, and its probe and feed do what the page says."""

import importlib
import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from blip_core import MEDConfig, MEDTokenizer, build_model, retrieval_recalls

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COLOURS = ("red", "green", "blue", "white")
THINGS = ("dog", "ball", "boat", "hill", "house")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark's modules, which import each other by name."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("photos_training", "photo_pairs", "probe", "curve_svg")
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def tokenizer() -> MEDTokenizer:
    return MEDTokenizer.train([" ".join((*COLOURS, *THINGS, "a on the"))] * 3, 120)


@pytest.fixture
def config(tokenizer: MEDTokenizer) -> MEDConfig:
    return MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Sixteen flat pictures a split, five captions each."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    rng, records = np.random.default_rng(0), []
    for split in ("train", "dev", "test"):
        for number in range(16):
            name = f"{split}-{number}.png"
            colour, thing = COLOURS[number % 4], THINGS[number % 5]
            pixels = rng.integers(0, 256, (1, 1, 3)).repeat(32, axis=0).repeat(32, axis=1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
            captions = [f"a {colour} {thing}" + " on the hill" * extra for extra in range(5)]
            records.append({"image": name, "split": split, "captions": captions})
    (folder / "captions.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


@pytest.fixture
def start(config: MEDConfig, tokenizer: MEDTokenizer, tmp_path: Path) -> dict[str, Path]:
    """A folder of vision weights and one of a BERT, both of the tiny preset's shape."""
    model = build_model(config, seed=0)
    weights, bert, text = tmp_path / "weights", tmp_path / "bert", config.text
    weights.mkdir()
    save_file(dict(model.vision.state_dict()), weights / "vit.safetensors")
    tokenizer.save_pretrained(bert)
    shape = {
        "hidden_size": text.width,
        "num_attention_heads": text.num_heads,
        "intermediate_size": text.ffn_width,
        "num_hidden_layers": text.depth,
    }
    (bert / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    sizes = {
        "word_embeddings.weight": (text.vocab_size, text.width),
        "position_embeddings.weight": (text.max_positions, text.width),
        "token_type_embeddings.weight": (2, text.width),
    }
    state = {f"embeddings.{name}": torch.randn(size) * 0.2 for name, size in sizes.items()}
    linear: dict[str, tuple[int, int]] = {}
    norms = ["embeddings.LayerNorm"]
    for layer in range(text.depth):
        prefix = f"encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear[f"{prefix}.attention.{part}"] = (text.width, text.width)
        linear[f"{prefix}.intermediate.dense"] = (text.ffn_width, text.width)
        linear[f"{prefix}.output.dense"] = (text.width, text.ffn_width)
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    for name, size in linear.items():
        state |= {f"{name}.weight": torch.randn(size) * 0.2, f"{name}.bias": torch.zeros(size[0])}
    for name in norms:
        state |= {f"{name}.weight": torch.ones(text.width), f"{name}.bias": torch.zeros(text.width)}
    save_file(state, bert / "model.safetensors")
    return {"weights": weights, "text": bert}


def test_photos_training_measures_model_and_probe_on_the_same_images_and_resumes(
    modules: dict[str, ModuleType],
    photos: Path,
    start: dict[str, Path],
    config: MEDConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")  # METEOR's Java takes longer than all the rest
    training = modules["photos_training"]
    arguments = ["--photos", photos, "--weights", start["weights"], "--text", start["text"]]
    options = training.parser().parse_args([*map(str, arguments), "--out", str(tmp_path / "out")])
    options.phases = training.with_overrides(training.PHASES, [])
    options.quick = True
    for phase in options.phases.values():
        phase |= {"steps": 4, "batch_size": 8, "evaluate_every_steps": 2, "warmup_steps": 1}
    result = training.run(options, config)
    named = {
        title: {metric["name"]: metric for metric in found}
        for title, found in result["metrics"].items()
    }
    assert {title.split(",")[0] for title in named} == {"probe", "MED", "captions"}
    sizes = {found["i2t_r1"]["n"] for found in named.values() if "i2t_r1" in found}
    assert sizes == {16}
    assert {"itm_auc_random", "itm_auc_hard"} <= set(named["MED, re-ranked"])
    assert "cosine_auc_random" in named["MED, ITC alone"]
    assert all(
        metric["low"] <= metric["value"] <= metric["high"]
        for found in named.values()
        for metric in found.values()
    )
    assert set(result["captions"]) == {f"test-{number}.png" for number in range(16)}
    assert "| MED, re-ranked: i2t_r1 |" in training.summary(result)
    again = training.run(options, config)  # everything is found, nothing is trained again
    assert again["metrics"] == result["metrics"]
    svg = modules["curve_svg"].draw_curves(result["phases"])
    assert svg.startswith("<svg")
    assert "captioning loss" in svg


def test_photos_training_never_reads_the_test_split_when_it_ends_with_dev(
    modules: dict[str, ModuleType],
    photos: Path,
    start: dict[str, Path],
    config: MEDConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    for path in (photos / "images").glob("test-*"):
        path.unlink()
    training = modules["photos_training"]
    arguments = ["--photos", photos, "--weights", start["weights"], "--text", start["text"]]
    options = training.parser().parse_args([*map(str, arguments), "--out", str(tmp_path / "out")])
    options.until, options.quick = "dev", True
    options.phases = training.with_overrides(
        training.PHASES, ["match=null", "all=null", "align.batch_size=8"]
    )
    options.phases["align"] |= {"steps": 1, "warmup_steps": 0}
    result = training.run(options, config)
    assert result["split"] == "dev"
    assert list(result["phases"]) == ["align"]


@torch.no_grad()
def test_quiet_start_reads_a_text_with_an_image_nearly_as_the_text_alone(
    modules: dict[str, ModuleType], config: MEDConfig, tokenizer: MEDTokenizer
) -> None:
    model = build_model(config, seed=0).eval()
    for layer in model.text.stack():  # norms as a trained BERT has them
        layer.encoder_attention.norm.weight.fill_(0.6)
        layer.encoder_attention.norm.bias.fill_(0.1)
    tokens = tokenizer.encode(["a red dog", "a boat on the hill"], 24)
    image_kv = model.project_image(2.0 * torch.randn(2, 5, 32))

    def likeness() -> torch.Tensor:
        ids, mask = tokens.input_ids, tokens.attention_mask
        alone = model.text(ids, mask, mode="text")[:, 0]
        ids = tokenizer.encoder_ids(ids)
        fused = model.text(ids, mask, mode="fused", image_kv=image_kv)[:, 0]
        return torch.nn.functional.cosine_similarity(alone, fused)

    before = likeness()
    modules["photos_training"].quiet_start(model, tokenizer)
    assert likeness().min() > 0.95 > before.max()


def test_pair_feed_takes_every_image_once_an_epoch_and_every_caption_in_turn(
    modules: dict[str, ModuleType], tokenizer: MEDTokenizer
) -> None:
    pairs: Any = modules["photo_pairs"]
    captions = [[f"a {c}" + " on the hill" * n for n in range(5)] for c in COLOURS * 4]
    names = [str(number) for number in range(16)]
    tokens = np.arange(16 * 3 * 2).reshape(16, 3, 2).astype(np.float16)
    split = pairs.Split(names, captions, tokens)
    feed = pairs.PairFeed(split, tokenizer, batch_size=4, max_tokens=24, seed=1)
    seen: dict[str, set[str]] = {name: set() for name in names}
    for epoch in range(5):
        batches = [feed(4 * epoch + place) for place in range(4)]
        ids = [name for batch in batches for name in batch.image_ids]
        assert sorted(ids) == sorted(names)
        lengths = sorted(
            sorted(len(tokenizer.prompt_ids(t)) for t in batch.captions) for batch in batches
        )
        assert all(low[-1] <= high[0] for low, high in pairwise(lengths))
        for batch in batches:
            for place, (name, text) in enumerate(zip(batch.image_ids, batch.captions, strict=True)):
                seen[name].add(text)
                assert batch.image_embeds[place].equal(
                    torch.from_numpy(tokens[int(name)].astype(np.float32))
                )
    assert all(len(texts) == 5 for texts in seen.values())
    fresh = pairs.PairFeed(split, tokenizer, batch_size=4, max_tokens=24, seed=1)
    assert fresh(11).captions == feed(11).captions  # a function of the number alone


def test_probe_finds_a_linear_map_and_chooses_its_penalty_by_dev(
    modules: dict[str, ModuleType],
) -> None:
    probe: Any = modules["probe"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 6, generator=generator)
    texts = torch.nn.functional.normalize(images @ torch.randn(6, 8, generator=generator), dim=-1)
    train, dev, test = images.split([100, 50, 50])
    captions = [["a dog"]] * 50
    index = probe.index_of(captions)
    ridge, penalty = probe.best_ridge(train, texts[:100], dev, texts[100:150], index)
    assert penalty < max(probe.RIDGES)
    pairs = probe.as_pairs(ridge(test), ridge.centred(texts[150:]), captions)
    assert probe.cosine_auc(pairs).value > 0.95
    assert all(gain.low == gain.value == gain.high == 0 for gain in probe.gains(pairs, pairs))
    upside_down = probe.as_pairs(-ridge(test), ridge.centred(texts[150:]), captions)
    gain = probe.gains(pairs, upside_down)[0]
    found, lost = (
        retrieval_recalls(each.image_features @ each.text_features.T, index)["i2t_r1"]
        for each in (pairs, upside_down)
    )
    assert gain.name == "i2t_r1"
    assert gain.value == pytest.approx(found - lost)
    assert 0 < gain.low <= gain.value <= gain.high


def test_probe_takes_cls_and_the_mean_of_the_patches(modules: dict[str, ModuleType]) -> None:
    tokens = np.array([[[1, 2], [3, 5], [5, 9]]], dtype=np.float16)
    assert modules["probe"].image_features(tokens).tolist() == [[1.0, 2.0, 4.0, 7.0]]
