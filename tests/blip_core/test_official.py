"""The `.pth` layout of BLIP's authors: names, counts, round trips, and what is refused.

The files are built here, from tensors and the authors' names for them.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip_core import (
    MED,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    MEDConfig,
    build_model,
    load_official,
    save_official,
)
from blip_core.momentum import MomentumEncoders

DEPTH, WIDTH, WIDE, VOCAB, EMBED, QUEUE = 2, 64, 128, 50, 12, 6
State = dict[str, Tensor]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.1


def _linear(prefix: str, out: int, into: int) -> State:
    return {f"{prefix}.weight": _random(out, into), f"{prefix}.bias": _random(out)}


def _norm(prefix: str, width: int) -> State:
    return {f"{prefix}.weight": 1 + _random(width), f"{prefix}.bias": _random(width)}


def _visual(prefix: str) -> State:
    state = {
        f"{prefix}.cls_token": _random(1, 1, WIDE),
        f"{prefix}.pos_embed": _random(1, 1 + 16, WIDE),
        f"{prefix}.patch_embed.proj.weight": _random(WIDE, 3, 8, 8),
        f"{prefix}.patch_embed.proj.bias": _random(WIDE),
    } | _norm(f"{prefix}.norm", WIDE)
    for index in range(DEPTH):
        block = f"{prefix}.blocks.{index}"
        state |= _norm(f"{block}.norm1", WIDE) | _norm(f"{block}.norm2", WIDE)
        state |= _linear(f"{block}.attn.qkv", 3 * WIDE, WIDE)
        state |= _linear(f"{block}.attn.proj", WIDE, WIDE)
        state |= _linear(f"{block}.mlp.fc1", 4 * WIDE, WIDE)
        state |= _linear(f"{block}.mlp.fc2", WIDE, 4 * WIDE)
    return state


def _bert(prefix: str) -> State:
    state = {
        f"{prefix}.embeddings.position_ids": torch.arange(24)[None],
        f"{prefix}.embeddings.word_embeddings.weight": _random(VOCAB, WIDTH),
        f"{prefix}.embeddings.position_embeddings.weight": _random(24, WIDTH),
    } | _norm(f"{prefix}.embeddings.LayerNorm", WIDTH)
    for index in range(DEPTH):
        layer = f"{prefix}.encoder.layer.{index}"
        for name, into in (("attention", WIDTH), ("crossattention", WIDE)):
            state |= _linear(f"{layer}.{name}.self.query", WIDTH, WIDTH)
            state |= _linear(f"{layer}.{name}.self.key", WIDTH, into)
            state |= _linear(f"{layer}.{name}.self.value", WIDTH, into)
            state |= _linear(f"{layer}.{name}.output.dense", WIDTH, WIDTH)
            state |= _norm(f"{layer}.{name}.output.LayerNorm", WIDTH)
        state |= _linear(f"{layer}.intermediate.dense", 96, WIDTH)
        state |= _linear(f"{layer}.output.dense", WIDTH, 96)
        state |= _norm(f"{layer}.output.LayerNorm", WIDTH)
    return state


def _tie(state: State) -> State:
    """Encoder and decoder share all but self-attention."""
    for name in list(state):
        if name.startswith("text_encoder.") and ".attention." not in name:
            twin = name.replace("text_encoder.", "text_decoder.bert.")
            state[name] = state[twin].clone()
    return state


def _decoder() -> State:
    predictions = "text_decoder.cls.predictions"
    state = _bert("text_decoder.bert") | _linear(f"{predictions}.transform.dense", WIDTH, WIDTH)
    state |= _norm(f"{predictions}.transform.LayerNorm", WIDTH)
    state[f"{predictions}.bias"] = state[f"{predictions}.decoder.bias"] = _random(VOCAB)
    words = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    return state | {f"{predictions}.decoder.weight": words}


def _encoder() -> State:
    heads = _linear("vision_proj", EMBED, WIDE) | _linear("text_proj", EMBED, WIDTH)
    return _bert("text_encoder") | heads | _linear("itm_head", 2, WIDTH)


def _momentum(state: State) -> State:
    twins = _visual("visual_encoder_m") | _bert("text_encoder_m")
    for name in list(twins):  # the one part of theirs that ours does not keep: see official.py
        if ".crossattention." in name:
            twins[name] = state[name.replace("encoder_m.", "encoder.")].clone()
    twins |= _linear("vision_proj_m", EMBED, WIDE) | _linear("text_proj_m", EMBED, WIDTH)
    queues = {f"{side}_queue": _random(EMBED, QUEUE) for side in ("image", "text")}
    return state | twins | queues | {"temp": torch.tensor(0.043)}


def captioner() -> State:
    torch.manual_seed(0)
    return _visual("visual_encoder") | _decoder()


def matching() -> State:
    torch.manual_seed(0)
    return _visual("visual_encoder") | _encoder()


def retrieval() -> State:
    ids = torch.tensor([[7, 9, 7, 4, -100, -100]])
    return _momentum(matching()) | {"idx_queue": ids, "ptr_queue": torch.tensor([4])}


def pretrain() -> State:
    torch.manual_seed(0)
    state = _tie(_visual("visual_encoder") | _encoder() | _decoder())
    return _momentum(state) | {"queue_ptr": torch.tensor([2])}


LAYOUTS: dict[str, Callable[[], State]] = {
    "captioner": captioner,
    "matching": matching,
    "retrieval": retrieval,
    "pretrain": pretrain,
}


def _write(state: State, path: Path) -> Path:
    torch.save({"model": state, "epoch": 3, "config": {"lr": 1e-5}}, path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_the_authors_round_trips(name: str, tmp_path: Path) -> None:
    state = LAYOUTS[name]()
    loaded = load_official(_write(state, tmp_path / "model.pth"))
    save_official(loaded.model, tmp_path / "again.pth", momentum=loaded.momentum)
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    if name == "matching":  # their class has no temperature: it stays the initial one
        assert again.pop("temp").item() == pytest.approx(0.07)
    assert set(again) == set(state)
    for key, tensor in state.items():
        if key == "temp":
            assert again[key].item() == pytest.approx(tensor.item(), rel=1e-6)
        else:
            assert torch.equal(again[key], tensor), key


@torch.no_grad()
def test_every_tensor_lands_in_its_place(tmp_path: Path) -> None:
    state = pretrain()
    loaded = load_official(_write(state, tmp_path / "model.pth"))
    model, momentum = loaded.model, loaded.momentum
    assert momentum is not None
    assert model.config.heads == ("itc", "itm", "lm")
    assert (model.config.vision.num_heads, model.config.text.num_heads) == (2, 1)
    assert model.scale.item() == pytest.approx(1 / 0.043)
    layer = model.text.stack()[1]
    prefix = "text_encoder.encoder.layer.1.crossattention.self."
    key, value = layer.cross_attention.kv.weight.chunk(2)
    assert torch.equal(key, state[prefix + "key.weight"])
    assert torch.equal(value, state[prefix + "value.weight"])
    decoder = "text_decoder.bert.encoder.layer.1.attention.self."
    query, key, _ = layer.decoder_attention.qkv.bias.chunk(3)
    assert torch.equal(query, state[decoder + "query.bias"])
    assert torch.equal(key, state[decoder + "key.bias"])
    twin = momentum.get_parameter("text.layers.0.feed_forward.output.weight")
    assert torch.equal(twin, state["text_encoder_m.encoder.layer.0.output.dense.weight"])
    assert torch.equal(momentum.vision.pos_embed, state["visual_encoder_m.pos_embed"])
    assert torch.equal(momentum.queue.image_queue, state["image_queue"])
    assert (int(momentum.queue.queue_ptr), int(momentum.queue.num_valid)) == (2, QUEUE)
    batch = torch.tensor([5, 6])
    assert not momentum.queue.is_positive(batch, batch)[:, 2:].any(), "their queue has no ids"


def test_a_retrieval_queue_keeps_its_image_ids(tmp_path: Path) -> None:
    momentum = load_official(_write(retrieval(), tmp_path / "model.pth")).momentum
    assert momentum is not None
    assert int(momentum.queue.num_valid) == 4
    positive = momentum.queue.is_positive(torch.tensor([7]), torch.tensor([-1000]))
    assert positive.int().tolist() == [[1, 1, 0, 1, 0]]


@pytest.mark.parametrize(
    ("preset", "heads", "num_keys"),
    [
        ("base", ("itc", "itm", "lm"), 1272),
        ("large", ("itc", "itm", "lm"), 1560),
        ("base", ("lm",), 474),
        ("large", ("lm",), 618),
    ],
)
def test_the_number_of_keys_is_that_of_the_released_files(
    preset: str, heads: tuple[str, ...], num_keys: int
) -> None:
    from blip_core.official import _official_state

    with torch.device("meta"):
        model = MED(MEDConfig.preset(preset, heads=heads))
        momentum = MomentumEncoders(model, 57600) if len(heads) == 3 else None
        state = _official_state(model, momentum)
    assert len(state) == num_keys
    if momentum is not None:
        assert state["text_queue"].shape == (256, 57600)
        assert state["queue_ptr"].shape == (1,)
        assert state["temp"].shape == ()


def test_a_file_without_momentum_is_a_model_alone(tmp_path: Path) -> None:
    model = build_model(MEDConfig.preset("tiny"), seed=0)
    save_official(model, tmp_path / "model.pth")
    loaded = load_official(tmp_path / "model.pth", model.config)
    assert loaded.momentum is None
    expected = model.state_dict()
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_another_image_size_resizes_the_positions_of_both_encoders(tmp_path: Path) -> None:
    path = _write(pretrain(), tmp_path / "model.pth")
    loaded = load_official(path, image_size_px=48)
    assert loaded.model.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 37, WIDE)
    assert loaded.momentum is not None
    assert loaded.momentum.vision.pos_embed.shape == (1, 37, WIDE)
    model = MED.from_pretrained(path, image_size_px=48)
    assert torch.equal(model.vision.pos_embed, loaded.model.vision.pos_embed)
    old = pretrain()["visual_encoder.pos_embed"][:, 1:].view(1, 4, 4, WIDE).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(old, size=(6, 6), mode="bicubic")
    torch.testing.assert_close(model.vision.pos_embed[0, 1:], expected[0].flatten(1).T)


def _without(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        del state[name]

    return change


def _with(name: str, value: Tensor) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = value

    return change


ENCODER_FFN = "text_encoder.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "pretrain",
            _without("text_encoder_m.embeddings.LayerNorm.bias"),
            "absent: text_encoder_m",
        ),
        (
            "pretrain",
            _without("text_decoder.cls.predictions.decoder.weight"),
            "absent: .*decoder.w",
        ),
        ("captioner", _without("visual_encoder.norm.bias"), "absent: visual_encoder.norm.bias"),
        (
            "captioner",
            _with("text_decoder.pooler.bias", torch.zeros(3)),
            "unexpected: text_dec.*pool",
        ),
        ("captioner", _with("image_queue", torch.zeros(EMBED, 3)), "unexpected: image_queue"),
        ("captioner", _with("temp", torch.tensor(0.07)), "unexpected: temp"),
        ("pretrain", _without("queue_ptr"), "absent: queue_ptr"),
        ("pretrain", _without("temp"), "absent: temp"),
        ("pretrain", _with("ptr_queue", torch.tensor([0])), "unexpected: ptr_queue"),
        ("retrieval", _without("idx_queue"), "absent: idx_queue"),
        ("retrieval", _with("ptr_queue", torch.tensor([QUEUE])), "pointer is 6, but its size 6"),
        (
            "pretrain",
            _with("text_queue", torch.zeros(EMBED, 3)),
            r"text_queue \(12, 3\) for \(12, 6",
        ),
        (
            "pretrain",
            _with("temp", torch.tensor(-1.0)),
            "temp must be one number above 0, got -1.0",
        ),
        ("matching", _with("itm_head.bias", torch.zeros(3)), r"itm_head.bias \(3,\) for \(2,\)"),
        (
            "pretrain",
            _with(ENCODER_FFN, torch.zeros(WIDTH, 96)),
            "tied in the model but different in the file: .*layer.0.output.dense.weight",
        ),
        ("matching", _without("itm_head.weight"), "its heads are itc; its keys begin with"),
        ("captioner", _without("visual_encoder.pos_embed"), "absent: visual_encoder.pos_embed"),
    ],
)
def test_a_key_too_many_too_few_or_of_another_shape_is_listed(
    name: str, change: Callable[[State], None], message: str, tmp_path: Path
) -> None:
    state = LAYOUTS[name]()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_official(_write(state, tmp_path / "model.pth"))


def test_a_configuration_of_another_width_is_refused(tmp_path: Path) -> None:
    path = _write(captioner(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"shape: .*word_embeddings.weight \(50, 64\) for"):
        load_official(path, MEDConfig.preset("tiny"))


class _Code:
    """What a harmful file holds: pickled, it runs when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("ran"),))


def test_pickled_code_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": captioner(), "config": _Code()}, "model.pth")
    with pytest.raises(
        CheckpointError, match=r"model.pth needs pickled code to be read, .*refused"
    ):
        load_official("model.pth")
    assert not Path("ran").exists()


def test_a_damaged_absent_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = _write(captioner(), tmp_path / "model.pth")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptCheckpoint, match=r"model.pth cannot be read"):
        MED.from_pretrained(path)
    with pytest.raises(CheckpointError, match=r"no weights at .*other.pth"):
        MED.from_pretrained(tmp_path / "other.pth")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"has no 'model'.* it holds state_dict"):
        MED.from_pretrained(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=r"holds a list, not a dictionary"):
        MED.from_pretrained(path)


def test_heads_that_no_class_of_theirs_has_are_refused(tmp_path: Path) -> None:
    model = build_model(MEDConfig.preset("tiny", heads=("itc",)), seed=0)
    with pytest.raises(ConfigError, match="official layout has no class with heads itc: save with"):
        save_official(model, tmp_path / "model.pth")
    nano = build_model(MEDConfig.preset("nano", vocab_size=32), seed=0)
    with pytest.raises(ConfigError, match="official layout knows no vision stem 'conv'"):
        save_official(nano, tmp_path / "model.pth")


def test_the_temperature_is_a_divisor_there_and_a_logarithm_here(tmp_path: Path) -> None:
    model = build_model(MEDConfig.preset("tiny"), seed=0)
    model.logit_scale.data.fill_(math.log(1 / 0.02))
    save_official(model, tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert state["temp"].item() == pytest.approx(0.02)
