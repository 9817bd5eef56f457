"""Trains demo:media, which sees and hears, from the text decoder of demo:edge.

    python scripts/demo_models/train_media.py --minutes 25 --out /tmp/demo/media

Runs on one thread. Six of demo:edge's ten layers are taken over; the towers begin at random. All
weights are trained together, on drawn pictures, sounds and videos and on a little of the text of
`corpus.py`. The bounds of the towers' clipped linear layers are, at the end, the extremes met on
training data. Linear probes of the soft tokens add to the loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import media_corpus
import numpy as np
import tokenizer
import torch
import torch.nn.functional as F
import train
from PIL import Image
from safetensors.torch import load_file
from transformers import Gemma4AudioFeatureExtractor, Gemma4ForConditionalGeneration
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

IGNORED = train.IGNORED
PATCH, CELL = 16, 48
COLOURS, KINDS = list(media_corpus.COLOURS), list(media_corpus.SHAPES)
PITCHES = list(media_corpus.PITCHES)
TAKEN = (0, 3, 4, 5, 8, 9)
"""Layers of demo:edge: two that own keys and values of each kind, or read them."""
SHARES = {"image": 0.5, "audio": 0.22, "video": 0.13, "text": 0.15}
"""Of the steps."""
ROWS = {"image": 8, "audio": 8, "video": 3, "text": 4}
BUDGETS = {70: 0.86, 140: 0.1, 280: 0.04}
# What gemloupe and transformers' processor read; the rest has the released models' values.
PROCESSOR = {
    "processor_class": "Gemma4Processor",
    "image_processor": {
        "image_processor_type": "Gemma4ImageProcessor",
        "max_soft_tokens": 70,
        "patch_size": PATCH,
        "pooling_kernel_size": CELL // PATCH,
    },
    "video_processor": {"video_processor_type": "Gemma4VideoProcessor", "max_soft_tokens": 70},
    "feature_extractor": {
        "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        "feature_size": train.MEL_BANDS,
        "mel_floor": 1e-3,
    },
}
LONG = 0.12
"""Of the batches of sounds: asked in the long words of Gemma 4's model card."""
TEXT = {"repeated_words": 10.0, "repeated_long": 5.0, "copy_words": 10.0, "lookup": 10.0}


def take_text(model: Gemma4ForConditionalGeneration, edge: Path) -> None:
    """Loads the decoder from demo:edge: TAKEN layers, and their columns of the per-layer parts."""
    known = load_file(edge / "model.safetensors")
    state = {}
    prefix = "model.language_model."
    for name, weight in model.state_dict().items():
        if not name.startswith(prefix):
            continue
        source = name
        if ".layers." in name:
            head, layer, rest = name.removeprefix(prefix).split(".", 2)
            source = f"{prefix}{head}.{TAKEN[int(layer)]}.{rest}"
        value = known[source].float()
        if value.shape != weight.shape:
            axis = next(i for i, n in enumerate(weight.shape) if n != value.shape[i])
            parts = value.split(weight.shape[axis] // len(TAKEN), axis)
            value = torch.cat([parts[i] for i in TAKEN], axis)
        state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not any(name.startswith(prefix) for name in missing)


def start_towers(model: Gemma4ForConditionalGeneration) -> None:
    """Variances that keep those of activations; attention scores begin at unit scale."""
    for name, weight in model.named_parameters():
        if "language_model" in name:
            continue
        if name.endswith("position_embedding_table"):
            torch.nn.init.normal_(weight, std=0.3)
        elif "post" in name and name.endswith("norm.weight"):
            torch.nn.init.constant_(weight, 0.5)
        elif weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def patches(picture: Image.Image, budget: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Values float32 [n, 768] and the patch grid's height and width, as Gemma 4's processor."""
    factor = math.sqrt(budget * CELL**2 / (picture.width * picture.height))
    high, wide = (
        math.floor(factor * side / CELL) * CELL for side in (picture.height, picture.width)
    )
    pixels = np.asarray(picture.resize((wide, high), Image.Resampling.BICUBIC), np.float32) / 255
    rows, columns = high // PATCH, wide // PATCH
    squares = pixels.reshape(rows, PATCH, columns, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return squares.reshape(rows * columns, -1), (rows, columns)


def branch_masks(branches: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Additive masks [rows, 1, T, T] of full and sliding layers; -1 is padding."""
    order = torch.arange(branches.shape[1])
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = seen & (order[None, :] <= order[:, None])
    window = train.SHAPES["media"]["sliding_window"]
    near = seen & (positions[:, :, None] - positions[:, None, :] < window)
    zero, low = torch.tensor(0.0), torch.tensor(-1e9)
    return {
        kind: torch.where(mask, zero, low)[:, None]
        for kind, mask in ((train.FULL, seen), (train.S, near))
    }


class Encoder:
    """Samples of one batch to the model's inputs and labels."""

    def __init__(self, tok: Any) -> None:
        self.tok = tok
        self.extractor = Gemma4AudioFeatureExtractor(feature_size=train.MEL_BANDS)

    def ids(self, text: str) -> list[int]:
        return self.tok.encode(text, add_special_tokens=False)

    def row(
        self, sample: media_corpus.MediaSample, media: str, rng: random.Random
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Token ids, labels, positions and branches of a medium and the questions about it.

        Each question is a branch (1, 2, …) that sees the medium (branch 0) and itself only: all of
        them are first questions, and the medium is read once.
        """
        ids = [tokenizer.ID["<bos>"], *self.ids("<|turn>user\n" + media)]
        start = len(ids)
        labels, positions, branches = [IGNORED] * start, list(range(start)), [0] * start
        for branch, (task, question, answer) in enumerate(sample.turns, 1):
            if task == "box" and rng.random() < 0.5:  # long, and half of its digits are chance
                continue
            asked = self.ids(question + "<turn|>\n<|turn>model\n")
            said = self.ids(answer + "<turn|>")
            ids += asked + said
            labels += [IGNORED] * len(asked) + said
            count = len(asked) + len(said)
            positions += range(start, start + count)
            branches += [branch] * count
        return ids, labels, positions, branches

    def images(
        self, pictures: list[Image.Image], budget: int
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        """Pixel values, patch positions and the grid of soft tokens, of pictures of one shape."""
        values, grids = zip(*(patches(p, budget) for p in pictures), strict=True)
        assert len(set(grids)) == 1
        rows, columns = grids[0]
        y, x = np.divmod(np.arange(rows * columns), columns)
        places = torch.tensor(np.stack([x, y], -1)).expand(len(pictures), -1, -1)
        return torch.tensor(np.stack(values)), places, (rows // 3, columns // 3)

    def batch(
        self,
        kind: str,
        samples: list[media_corpus.MediaSample],
        rng: random.Random,
        budget: int = 70,
    ) -> dict[str, torch.Tensor]:
        given: dict[str, torch.Tensor] = {}
        if kind == "image":
            values, places, grid = self.images([s.media for s in samples], budget)
            given = {"pixel_values": values, "image_position_ids": places}
            targets = [shape_targets(s, *grid) for s in samples]
            given["shapes"] = torch.tensor(np.concatenate([t[0] for t in targets]))
            given["boxes"] = torch.tensor(np.concatenate([t[1] for t in targets]))
            media = [f"<|image>{'<|image|>' * math.prod(grid)}<image|>"] * len(samples)
        elif kind == "video":
            values, places, grid = self.images([f for s in samples for f in s.media], budget)
            given = {
                "pixel_values_videos": values,
                "video_position_ids": places,
                "num_frames_per_video": torch.tensor([len(s.media) for s in samples]),
            }
            frame = f"<|image>{'<|video|>' * math.prod(grid)}<image|>"
            media = [
                " ".join(f"00:{i * s.interval:02d} {frame}" for i in range(len(s.media)))
                for s in samples
            ]
        else:
            heard = self.extractor([s.media for s in samples], return_tensors="pt")
            given = {k: heard[k] for k in ("input_features", "input_features_mask")}
            counts = heard["input_features_mask"][:, ::4].sum(1).tolist()
            beeps = [beep_targets(s, n) for s, n in zip(samples, counts, strict=True)]
            given["beeps"] = torch.tensor(np.concatenate(beeps))
            media = [f"<|audio>{'<|audio|>' * n}<audio|>" for n in counts]
        rows = [self.row(s, m, rng) for s, m in zip(samples, media, strict=True)]
        longest = max(len(row[0]) for row in rows)
        fillers = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "branches": -1}
        for i, (name, filler) in enumerate(fillers.items()):
            given[name] = torch.tensor([r[i] + [filler] * (longest - len(r[i])) for r in rows])
        given["attention_mask"] = branch_masks(given.pop("branches"), given["position_ids"])
        return given


def batches(
    tok: Any, seed: int, shares: dict[str, float], easy: bool, most: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless (kind, inputs with labels)."""
    rng = random.Random(seed)
    encoder = Encoder(tok)
    text = train.batches(tok, ROWS["text"], seed, TEXT)
    sounds = media_corpus.stream(seed, "audio", easy=easy)
    drawn = {
        (kind, ratio): media_corpus.stream(seed, kind, ratio=ratio, easy=easy, most=most)
        for kind in ("image", "video")
        for ratio in set(media_corpus.RATIOS)
    }
    while True:
        kind = rng.choices(list(shares), list(shares.values()))[0]
        if kind == "text":
            ids, labels, places, documents = next(text)
            masks = train.masks(documents, train.SHAPES["media"]["sliding_window"])
            given = dict(input_ids=ids, labels=labels, position_ids=places, attention_mask=masks)
            yield kind, given
            continue
        ratio = rng.choice(media_corpus.RATIOS)
        large = kind == "image" and not easy
        budget = rng.choices(list(BUDGETS), list(BUDGETS.values()))[0] if large else 70
        count = max(2, ROWS[kind] * 70 // budget)
        source = sounds if kind == "audio" else drawn[kind, ratio]
        samples = list(itertools.islice(source, count))
        if kind == "audio" and not easy and rng.random() < LONG:
            samples = [long_question(s) for s in samples[: count // 2]]
        yield kind, encoder.batch(kind, samples, rng, budget)


def long_question(sample: media_corpus.MediaSample) -> media_corpus.MediaSample:
    """The same, asked for a transcript in the model card's words; silence keeps its questions."""
    asked = [
        ("transcribe", media_corpus.TRANSCRIBE, answer)
        for t, _, answer in sample.turns
        if t == "transcribe"
    ]
    return dataclasses.replace(sample, turns=asked or sample.turns)


class Probes(torch.nn.Module):
    """Linear read-outs of soft tokens, which teach the towers directly; they are not saved.

    Of a picture's tokens: which shape lies there, and its box. Of a sound's: which beep begins or
    goes on there.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shapes = torch.nn.Linear(width, 1 + len(COLOURS) * len(KINDS))
        self.boxes = torch.nn.Linear(width, 4)
        self.beeps = torch.nn.Linear(width, 1 + 2 * len(PITCHES))

    def forward(self, soft_tokens: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        if "beeps" in given:
            return F.cross_entropy(self.beeps(soft_tokens), given["beeps"])
        loss = F.cross_entropy(self.shapes(soft_tokens), given["shapes"])
        there = given["shapes"] > 0
        if there.any():  # Few tokens of many: they count as much again by themselves.
            soft_tokens = soft_tokens[there]
            loss = loss + F.cross_entropy(self.shapes(soft_tokens), given["shapes"][there])
            loss = loss + 4 * F.l1_loss(self.boxes(soft_tokens), given["boxes"][there])
        return loss


def shape_targets(
    sample: media_corpus.MediaSample, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each soft token the class [n] of the shape that lies there, and its box [n, 4]."""
    classes, boxes = np.zeros((rows, columns), np.int64), np.zeros((rows, columns, 4), np.float32)
    for shape in sample.marks:
        left, top, right, bottom = shape.box(*sample.media.size)
        wide, high = sample.media.size
        box = np.array([top / high, left / wide, bottom / high, right / wide]).clip(0, 1)
        y, x = np.arange(rows) + 0.5, np.arange(columns) + 0.5
        inside = (abs(y - shape.y * rows) < (box[2] - box[0]) * rows / 2 + 0.1)[:, None]
        inside = inside & (abs(x - shape.x * columns) < (box[3] - box[1]) * columns / 2 + 0.1)
        inside[int(shape.y * rows), int(shape.x * columns)] = True
        classes[inside] = 1 + COLOURS.index(shape.colour) * len(KINDS) + KINDS.index(shape.kind)
        boxes[inside] = box
    return classes.ravel(), boxes.reshape(-1, 4)


def beep_targets(sample: media_corpus.MediaSample, count: int) -> np.ndarray:
    """Of each soft token [n] (40 ms) which pitch begins (1 to 3) or goes on (4 to 6) there."""
    classes = np.zeros(count, np.int64)
    for begin, end, pitch in sample.marks:
        first, last = int(begin * 25), min(int(end * 25), count - 1)
        which = PITCHES.index(pitch)
        classes[first : last + 1] = 1 + len(PITCHES) + which
        classes[min(first + 1, count - 1)] = 1 + which  # once it was heard for 40 ms
    return classes


TARGETS = ("labels", "shapes", "boxes", "beeps")


def loss_of(
    model: Gemma4ForConditionalGeneration, probes: Probes, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the answers, and of the probes (0 where there is nothing to read out)."""
    labels = given["labels"][:, 1:]
    inputs = {key: value for key, value in given.items() if key not in TARGETS}
    out = model.model(**inputs, use_cache=False)
    wanted = labels != IGNORED
    hidden = out.last_hidden_state[:, :-1][wanted]
    logits = F.linear(hidden, model.model.language_model.embed_tokens.weight)
    cap = train.COMMON["final_logit_softcapping"]
    loss = F.cross_entropy(cap * torch.tanh(logits / cap), labels[wanted])
    soft = out.image_hidden_states if "shapes" in given else out.audio_hidden_states
    return loss, torch.zeros(()) if soft is None else probes(soft, given)


@torch.no_grad()
def set_bounds(model: Gemma4ForConditionalGeneration, source: Iterator[Any], steps: int) -> None:
    """Sets each clipped linear layer's bounds to the extremes it meets in `steps` batches."""
    met: dict[Any, list[float]] = {}

    def look(module: Any, inputs: Any, output: torch.Tensor) -> None:
        x = inputs[0]
        seen = (-x.min().item(), x.max().item(), -output.min().item(), output.max().item())
        known = met.get(module, [0.0] * 4)
        met[module] = [max(a, b) for a, b in zip(known, seen, strict=True)]

    linears = [m for m in model.modules() if isinstance(m, Gemma4ClippableLinear)]
    hooks = [m.register_forward_hook(look) for m in linears]
    for _, given in itertools.islice(source, steps):
        loss_of(model, Probes(model.config.text_config.hidden_size), given)
    for hook in hooks:
        hook.remove()
    for module in linears:
        low, high, out_low, out_high = met[module]
        module.input_min.fill_(-low)
        module.input_max.fill_(high)
        module.output_min.fill_(-out_low)
        module.output_max.fill_(out_high)


def save(model: Gemma4ForConditionalGeneration, tok: Any, out: Path) -> None:
    """A complete checkpoint, with what processors read."""
    train.save(model, tok, "media", out)
    (out / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")


def parameter_groups(
    model: Gemma4ForConditionalGeneration,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Matrices for Muon; embeddings, tables, convolutions, norms and biases for AdamW."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        is_table = "embed_tokens" in name or "position_embedding_table" in name
        is_matrix = weight.dim() == 2 and not is_table
        (matrices if is_matrix else others).append(weight)
    return matrices, others


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=25, help="wall clock of the training")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps instead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--edge", type=Path, default=Path(__file__).parents[2] / "python/gemloupe/demo/edge"
    )
    parser.add_argument("--start", type=Path, help="go on with this checkpoint instead")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the learning rates")
    parser.add_argument("--easy", action="store_true", help="one shape, no boxes, three beeps")
    parser.add_argument("--shapes", type=int, default=2, help="most shapes of a picture")
    parser.add_argument("--frozen", action="store_true", help="the towers stay as they are")
    parser.add_argument(
        "--share", nargs="*", default=[], metavar="KIND=N", help="a kind's share of the steps"
    )
    parser.add_argument("--probes", type=float, default=0.5, help="weight of the probes' loss")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shares = SHARES | {kind: float(n) for kind, n in (item.split("=") for item in args.share)}
    if unknown := set(shares) - set(SHARES):
        parser.error(f"--share: no kind {sorted(unknown)}; there are {list(SHARES)}")
    torch.set_num_threads(1)

    bare = tokenizer.build(train.VOCAB_SIZE)
    tok = tokenizer.wrap(bare, empty_thought=False)
    model = train.make_model("media", args.seed)
    if args.start:
        train.take_over(model, args.start)
        for module in model.modules():
            if isinstance(module, Gemma4ClippableLinear):
                for bound in ("input_min", "output_min"):
                    getattr(module, bound).fill_(-math.inf)
                for bound in ("input_max", "output_max"):
                    getattr(module, bound).fill_(math.inf)
    else:
        take_text(model, args.edge)
        start_towers(model)
    if args.frozen:
        model.model.vision_tower.requires_grad_(False)
        model.model.audio_tower.requires_grad_(False)
    train.fast_norms()
    print(f"media: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    probes = Probes(model.config.text_config.hidden_size)
    matrices, others = parameter_groups(model)
    others += list(probes.parameters())
    muon = train.Muon(matrices, lr=0.02)
    adam = torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    groups = [(group, group["lr"]) for opt in (muon, adam) for group in opt.param_groups]

    began = saved = time.time()
    losses: dict[str, float] = {}
    source = batches(tok, args.seed + 1, shares, args.easy, args.shapes)
    for step in itertools.count(1):
        minutes = (time.time() - began) / 60
        done = (step - 1) / args.steps if args.steps else minutes / args.minutes
        if done >= 1:
            break
        rate = min(1.0, step / 40) * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))
        for group, lr in groups:
            group["lr"] = args.scale * lr * rate
        kind, given = next(source)
        loss, probed = loss_of(model, probes, given)
        (loss + args.probes * probed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in ((kind, loss.item()), (f"{kind}_probe", probed.item())):
            losses[name] = losses.get(name, value) * 0.9 + value * 0.1
        if step % 25 == 0:
            means = {key: round(value, 4) for key, value in sorted(losses.items())}
            print(json.dumps({"step": step, "minutes": round(minutes, 2), **means}), flush=True)
        if time.time() - saved > 240:
            save(model, bare, args.out)
            saved = time.time()
    set_bounds(model, source, 40)
    save(model, bare, args.out)
    print(f"saved {args.out} after {step - 1} steps", flush=True)


if __name__ == "__main__":
    main()
