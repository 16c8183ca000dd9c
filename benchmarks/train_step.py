"""One pretraining step against a plain one made of transformers' BLIP classes.

Both do the same: ITC with momentum twins and a full queue, ITM with hard negatives, LM with label
smoothing, dropout 0.1 in the text stack, gradient clipping and AdamW, on the same captions. Before
anything is timed, two small models with the same weights must give the same losses and gradients.

    python benchmarks/train_step.py [--quick] [--json PATH] [--profile] [--device cuda]

The ratio is of process CPU time on a CPU, of wall time on a GPU: medians of interleaved rounds.
"""

import argparse
import copy
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from equal_work import copy_weights, gradient_norm
from step_profile import flops_per_image, marked, phase, print_table, profile_step
from torch import Tensor, nn
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from blip_core import Batch, MEDConfig, MEDTokenizer, build_model
from blip_core.momentum import MomentumEncoders
from blip_core.objectives import OBJECTIVES, StepInputs, compute_losses
from blip_core.schedule import parameter_groups

PADDED_TO = 30
QUEUE_SIZE = 57600
MOMENTUM, ALPHA, SMOOTHING, CLIP, DECAY, RATE = 0.995, 0.4, 0.1, 1.0, 0.05, 1e-4
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 products a second of the SXM boards, from their data sheets."""
TARGETS = {("bfloat16", "padded"): 1.6, ("float32", "padded"): 1.7}
TARGET_LONGEST = 1.2
WORDS = tuple(f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or"))


class PlainBLIP(nn.Module):
    """BLIP's pretraining model, assembled from transformers' classes as the paper's code assembles its own.

    The decoder's embeddings, cross-attention and feed-forward are the encoder's.
    """

    def __init__(self, config: MEDConfig, dropout: float, queue_size: int) -> None:
        super().__init__()
        vision, text = config.vision, config.text
        vision_config = BlipVisionConfig(
            hidden_size=vision.width,
            intermediate_size=int(vision.width * vision.mlp_ratio),
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size_px,
            patch_size=vision.patch_size_px,
            layer_norm_eps=vision.layer_norm_eps,
            attention_dropout=0.0,
        )
        text_config = BlipTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            encoder_hidden_size=vision.width,
            intermediate_size=text.ffn_width,
            num_hidden_layers=text.depth,
            num_attention_heads=text.num_heads,
            max_position_embeddings=text.max_positions,
            layer_norm_eps=text.layer_norm_eps,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            label_smoothing=SMOOTHING,
            is_decoder=True,
            bos_token_id=None,
        )
        self.vision = BlipVisionModel(vision_config)
        self.text_encoder = BlipTextModel(text_config, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(text_config)
        decoder = self.text_decoder.bert
        self.text_encoder.embeddings = decoder.embeddings
        for mine, shared in zip(
            self.text_encoder.encoder.layer, decoder.encoder.layer, strict=True
        ):
            mine.crossattention, mine.intermediate = shared.crossattention, shared.intermediate
            mine.output = shared.output
        self.vision_proj = nn.Linear(vision.width, config.embed_width)
        self.text_proj = nn.Linear(text.width, config.embed_width)
        self.itm_head = nn.Linear(text.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        online = (self.vision, self.vision_proj, self.text_encoder, self.text_proj)
        self.twins = [
            (part, copy.deepcopy(part).requires_grad_(False).eval()) for part in online
        ]  # a plain list: not trained, and not in parameters()
        queues = F.normalize(torch.randn(2, config.embed_width, queue_size), dim=1)
        self.register_buffer("image_queue", queues[0])
        self.register_buffer("text_queue", queues[1])
        self.queue_ptr = 0

    def twins_to(self, device: torch.device) -> None:
        """Move the twins, which `to` does not see."""
        for _, twin in self.twins:
            twin.to(device)

    def losses(self, pixel_values: Tensor, ids: Tensor, mask: Tensor, dec: int, enc: int) -> Tensor:
        """Return the three losses (3,) of B images with one text each; the queue grows."""
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_embeds = self.vision(pixel_values).last_hidden_state
        image_mask = torch.ones(image_embeds.shape[:-1], dtype=torch.long, device=ids.device)
        image_features = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        text_embeds = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        text_features = F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)
        loss_itc, sim_i2t, sim_t2i = self.contrast(
            image_features, text_features, pixel_values, ids, mask
        )
        encoder_ids = ids.clone()
        encoder_ids[:, 0] = enc
        loss_itm = self.match(sim_i2t, sim_t2i, image_embeds, image_mask, encoder_ids, mask)
        decoder_ids = ids.clone()
        decoder_ids[:, 0] = dec
        loss_lm = self.text_decoder(
            decoder_ids,
            attention_mask=mask,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_mask,
            labels=decoder_ids.masked_fill(mask == 0, -100),
        ).loss
        return torch.stack([loss_itc, loss_itm, loss_lm])

    def contrast(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pixel_values: Tensor,
        ids: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC with the twins' soft targets; also the batch's similarities (B, B)."""
        with torch.no_grad():
            for part, twin in self.twins:
                for online, slow in zip(part.parameters(), twin.parameters(), strict=True):
                    slow.mul_(MOMENTUM).add_(online, alpha=1 - MOMENTUM)
            vision, vision_proj, text, text_proj = (twin for _, twin in self.twins)
            image_slow = F.normalize(vision_proj(vision(pixel_values).last_hidden_state[:, 0]))
            text_slow = F.normalize(
                text_proj(text(ids, attention_mask=mask).last_hidden_state[:, 0])
            )
            images = torch.cat([image_slow.t(), self.image_queue.clone()], dim=1)
            texts = torch.cat([text_slow.t(), self.text_queue.clone()], dim=1)
            known = torch.zeros(len(ids), images.shape[1], device=ids.device).fill_diagonal_(1)
            soft_i2t = F.softmax(image_slow @ texts / self.temp, dim=1)
            soft_t2i = F.softmax(text_slow @ images / self.temp, dim=1)
            targets_i2t = ALPHA * soft_i2t + (1 - ALPHA) * known
            targets_t2i = ALPHA * soft_t2i + (1 - ALPHA) * known
        sim_i2t = image_features @ texts / self.temp
        sim_t2i = text_features @ images / self.temp
        loss_i2t = -(F.log_softmax(sim_i2t, dim=1) * targets_i2t).sum(1).mean()
        loss_t2i = -(F.log_softmax(sim_t2i, dim=1) * targets_t2i).sum(1).mean()
        slots = slice(self.queue_ptr, self.queue_ptr + len(ids))
        self.image_queue[:, slots], self.text_queue[:, slots] = image_slow.t(), text_slow.t()
        self.queue_ptr = (self.queue_ptr + len(ids)) % self.image_queue.shape[1]
        return (loss_i2t + loss_t2i) / 2, sim_i2t[:, : len(ids)], sim_t2i[:, : len(ids)]

    def match(
        self,
        sim_i2t: Tensor,
        sim_t2i: Tensor,
        image_embeds: Tensor,
        image_mask: Tensor,
        ids: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """ITM: one pass over the positives, one over twice as many hard negatives."""
        with torch.no_grad():
            weights_t2i = (F.softmax(sim_t2i.float(), dim=1) + 1e-4).fill_diagonal_(0)
            weights_i2t = (F.softmax(sim_i2t.float(), dim=1) + 1e-4).fill_diagonal_(0)
            images = torch.multinomial(weights_t2i, 1).flatten()
            texts = torch.multinomial(weights_i2t, 1).flatten()
        positive = self.text_encoder(
            ids,
            attention_mask=mask,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_mask,
        ).last_hidden_state
        negative = self.text_encoder(
            torch.cat([ids, ids[texts]]),
            attention_mask=torch.cat([mask, mask[texts]]),
            encoder_hidden_states=torch.cat([image_embeds[images], image_embeds]),
            encoder_attention_mask=torch.cat([image_mask, image_mask]),
        ).last_hidden_state
        logits = self.itm_head(torch.cat([positive[:, 0], negative[:, 0]]))
        labels = torch.zeros(len(logits), dtype=torch.long, device=ids.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(logits, labels)


class OurStep:
    """blip_core's step: what `train` does with a batch, through the same functions."""

    def __init__(self, config: MEDConfig, tokenizer: MEDTokenizer, options: argparse.Namespace):
        self.tokenizer, self.clip = tokenizer, CLIP
        self.device = torch.device(options.device)
        self.model = build_model(config, seed=0).to(self.device).train()
        self.momentum = MomentumEncoders(self.model, options.queue_size)
        fill_queue(self.momentum)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, DECAY), lr=RATE, fused=True)

    def __call__(self, batch: Batch, dtype: str) -> Tensor:
        """Do one step; returns the three losses (3,)."""
        model, momentum = self.model, self.momentum
        model.clamp_scale()
        with phase("momentum update"):
            momentum.update(model, MOMENTUM)
        inputs = StepInputs.from_batch(batch, self.tokenizer, "", PADDED_TO).to(self.device)
        with phase("forward"), autocast(self.device, dtype):
            losses = compute_losses(
                model,
                momentum,
                inputs,
                objectives=OBJECTIVES,
                distill_alpha=ALPHA,
                label_smoothing=SMOOTHING,
            )
        self.optimizer.zero_grad(set_to_none=True)
        with phase("backward"):
            losses.total.backward()
        with phase("clip"):
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        with phase("optimizer"):
            self.optimizer.step()
        assert losses.enqueue is not None
        momentum.queue.enqueue(*losses.enqueue)
        parts = (losses.loss_itc, losses.loss_itm, losses.loss_lm)
        return torch.stack([part.detach() for part in parts if part is not None])


class PlainStep:
    """The baseline's step, its texts padded to `tokens` (None: to the batch's longest)."""

    def __init__(self, config: MEDConfig, tokenizer: MEDTokenizer, options: argparse.Namespace):
        self.tokenizer, self.clip = tokenizer, CLIP
        self.device = torch.device(options.device)
        torch.manual_seed(0)
        self.model = PlainBLIP(config, config.text.dropout, options.queue_size)
        self.model.to(self.device).train()
        self.model.twins_to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY)

    def __call__(self, batch: Batch, dtype: str, tokens: int | None) -> Tensor:
        """Do one step; returns the three losses (3,)."""
        encoded = self.tokenizer.encode(batch.captions, PADDED_TO)
        missing = 0 if tokens is None else tokens - encoded.input_ids.shape[1]
        ids = F.pad(encoded.input_ids, (0, missing), value=self.tokenizer.pad_id).to(self.device)
        mask = F.pad(encoded.attention_mask, (0, missing)).to(self.device)
        with autocast(self.device, dtype):
            losses = self.model.losses(
                batch.pixel_values.to(self.device),
                ids,
                mask,
                self.tokenizer.dec_id,
                self.tokenizer.enc_id,
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return losses.detach()


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return the context of a forward pass in `dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def fill_queue(momentum: MomentumEncoders) -> None:
    """Fill the queue with random features, as after some thousand steps."""
    queue = momentum.queue
    width, size = queue.image_queue.shape
    features = F.normalize(torch.randn(2, size, width), dim=-1).to(queue.image_queue.device)
    ids = torch.arange(size, device=features.device)
    queue.enqueue(features[0], features[1], -1 - ids, -1 - ids)


def make_batch(config: MEDConfig, batch_size: int, longest: int, seed: int) -> Batch:
    """Random pixels, and captions of half of `longest` to `longest` tokens, one of them longest."""
    generator = torch.Generator().manual_seed(seed)
    side = config.vision.image_size_px
    low = max(1, longest // 2 - 2)
    lengths = torch.randint(low, longest - 1, (batch_size,), generator=generator)
    lengths[0] = longest - 2
    words = torch.randint(len(WORDS), (batch_size, longest), generator=generator)
    return Batch(
        pixel_values=torch.randn(batch_size, 3, side, side, generator=generator),
        captions=[
            " ".join(WORDS[w] for w in row[:length])
            for row, length in zip(words.tolist(), lengths.tolist(), strict=True)
        ],
        image_ids=[f"{seed}-{index}" for index in range(batch_size)],
    )


Step = Callable[[Batch], Tensor]


def check_equal_work(tokenizer: MEDTokenizer, options: argparse.Namespace) -> None:
    """Small models with the same weights, no dropout: the same losses and gradients, three steps long.

    Raises SystemExit with both figures otherwise. Parameter counts of the measured preset are compared too.
    """
    config = MEDConfig.preset("tiny", vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, dropout=0.0))
    small = argparse.Namespace(**{**vars(options), "queue_size": 64})
    ours, plain = OurStep(config, tokenizer, small), PlainStep(config, tokenizer, small)
    copy_weights(ours.model, plain.model)
    ours.clip = plain.clip = math.inf  # the scale's gradient is another where it is no logarithm
    ours.momentum = MomentumEncoders(ours.model, 64).to(ours.device)
    fill_queue(ours.momentum)
    for part, twin in plain.model.twins:
        twin.load_state_dict(part.state_dict())
    plain.model.image_queue.copy_(ours.momentum.queue.image_queue)
    plain.model.text_queue.copy_(ours.momentum.queue.text_queue)
    for seed in range(3):
        batch, figures = make_batch(config, 6, 12, seed), []
        for step, tokens in ((ours, ()), (plain, (PADDED_TO,))):
            torch.manual_seed(seed)
            losses = step(batch, "float32", *tokens)
            scale = "logit_scale" if step is ours else "temp"
            figures.append(torch.cat([losses, gradient_norm(step.model, without=scale)[None]]))
        with torch.no_grad():
            plain.model.temp.copy_(1 / ours.model.scale)
        if not torch.allclose(*figures, rtol=1e-4, atol=1e-5):
            raise SystemExit(f"not the same work: ours {figures[0]}, theirs {figures[1]}")


def measure(steps: dict[str, Step], batches: list[Batch], device: str) -> dict[str, dict[str, Any]]:
    """Run every step on every batch, interleaved; the first batch only warms up.

    Returns median seconds of `cpu` (this process, all threads) and `wall` for each step, and peak memory.
    """
    seconds: dict[str, dict[str, Any]] = {name: {"cpu": [], "wall": []} for name in steps}
    order = list(steps)
    for index, batch in enumerate(batches):
        for name in order[index % len(order) :] + order[: index % len(order)]:
            if device == "cuda":
                torch.cuda.synchronize()
            cpu, wall = time.process_time(), time.perf_counter()
            steps[name](batch)
            if device == "cuda":
                torch.cuda.synchronize()
            if index:
                seconds[name]["cpu"].append(time.process_time() - cpu)
                seconds[name]["wall"].append(time.perf_counter() - wall)
    return {
        name: {kind: statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in seconds.items()
    }


def compare(dtype: str, seconds: dict[str, dict[str, float]], device: str) -> list[dict[str, Any]]:
    """Return a line {name, ours, theirs, ratio, target} per baseline and clock."""
    lines = []
    judged = "wall" if device == "cuda" else "cpu"
    for baseline in ("padded", "longest"):
        for clock in (judged, "wall") if judged == "cpu" else (judged,):
            ours, theirs = seconds["ours"][clock], seconds[baseline][clock]
            target = TARGETS.get((dtype, "padded")) if baseline == "padded" else TARGET_LONGEST
            lines.append(
                {
                    "name": f"train_step/{dtype}/{baseline}/{clock}_s",
                    "ours": round(ours, 4),
                    "theirs": round(theirs, 4),
                    "ratio": round(theirs / ours, 3),
                    "target": target if clock == judged else None,
                }
            )
    return lines


def print_flops(config: MEDConfig, longest: int, rows: float, step_s: float, batch: int) -> None:
    """Print analytic FLOPs an image, and model FLOPs utilisation where the peak is known."""
    ours = flops_per_image(config, tokens=longest, lm_rows=rows)
    padded = flops_per_image(config, tokens=PADDED_TO, shared_kv=False)
    trimmed = flops_per_image(config, tokens=longest, shared_kv=False)
    total = sum(ours.values())
    print(
        f"GFLOPs an image: ours {total / 1e9:.1f}, plain at {longest} tokens "
        f"{sum(trimmed.values()) / 1e9:.1f}, plain at {PADDED_TO} {sum(padded.values()) / 1e9:.1f}"
    )
    rate = total * batch / step_s
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((peak for board, peak in PEAK_FLOPS.items() if board in name), None)
    share = f"{100 * rate / peak:.1f} % of {peak / 1e12:.0f} T" if peak else "peak unknown"
    print(f"ours: {batch / step_s:.2f} images/s, {rate / 1e12:.2f} TFLOP/s on {name} ({share})")


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round of two images")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="say where our step spends its time")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 128 on a GPU")
    parser.add_argument("--longest", type=int, default=14, help="tokens of a batch's longest text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queue-size", type=int, default=QUEUE_SIZE)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = 1 if options.quick else options.rounds
    batch_size = options.batch_size or (128 if options.device == "cuda" else 8)
    batch_size = 2 if options.quick else batch_size
    config = MEDConfig.preset(options.preset)
    tokenizer = MEDTokenizer.train([" ".join(WORDS)] * 3, 400)
    check_equal_work(tokenizer, options)
    batches = [make_batch(config, batch_size, options.longest, seed) for seed in range(rounds + 1)]
    ours, plain = (make(config, tokenizer, options) for make in (OurStep, PlainStep))
    lines: list[dict[str, Any]] = []
    for dtype in options.dtype:
        steps: dict[str, Step] = {
            "ours": lambda batch, dtype=dtype: ours(batch, dtype),
            "padded": lambda batch, dtype=dtype: plain(batch, dtype, PADDED_TO),
            "longest": lambda batch, dtype=dtype: plain(batch, dtype, None),
        }
        seconds = measure(steps, batches, options.device)
        for line in compare(dtype, seconds, options.device):
            lines.append(line)
            print(json.dumps(line), flush=True)
        print_flops(
            config, options.longest, options.longest * 0.7, seconds["ours"]["wall"], batch_size
        )
        if options.profile:
            with marked(("", ours.model), ("twin", ours.momentum)):
                tables = profile_step(
                    lambda dtype=dtype: ours(batches[0], dtype), cuda=options.device == "cuda"
                )
            for title, table in tables.items():
                print_table(f"ours, {dtype}, {title}", table, 30)
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
