"""Measures demo:media on held-out pictures, sounds and videos, for the tables of its card.

    python scripts/demo_models/evaluate_media.py python/gemloupe/demo/media --json /tmp/media.json

gemloupe computes (float32; its greedy tokens equal transformers', see tests/test_demo_media.py).
Answers are right only if they equal the expected ones character by character; of a box the overlap
with the drawn one is measured (intersection over union), and its label must be right.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import media_corpus
import numpy as np

import gemloupe as gl

TASKS = {
    "image": ("describe", "colour", "place", "shape", "box"),
    "audio": ("describe", "count", "transcribe"),
    "video": ("describe", "when"),
}
# Kind of medium, and how many shapes its pictures have (0: any).
GROUPS = {
    "one shape": ("image", 1),
    "two shapes": ("image", 2),
    "sounds": ("audio", 0),
    "videos": ("video", 0),
}
BUDGETS = (70, 140, 280)
BATCH = 25


def ask(model: Any, kind: str, media: list[Any], questions: list[str]) -> list[str]:
    """Greedy answers, one a medium and question."""
    argument = {"image": "images", "audio": "audio", "video": "videos"}[kind]
    answers = []
    for i in range(0, len(media), BATCH):
        chats = [
            [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}]
            for question in questions[i : i + BATCH]
        ]
        given = {argument: [[one] for one in media[i : i + BATCH]]}
        outs = model.generate(chats, temperature=0, max_new_tokens=60, routing=False, **given)
        answers += [out.text for out in outs]
    return answers


def as_given(sample: media_corpus.MediaSample) -> Any:
    """The medium as gemloupe takes it."""
    if sample.kind == "video":
        return gl.video(sample.media, fps=1 / sample.interval)
    return sample.media


def encoded(model: Any, sample: media_corpus.MediaSample, budget: int | None = None) -> Any:
    """Soft tokens, so that several questions share one pass of the tower."""
    if sample.kind == "image":
        return model.encode_image(sample.media, budget)
    if sample.kind == "audio":
        return model.encode_audio(sample.media)
    return model.encode_video(as_given(sample))


def overlap(reply: str, expected: str) -> float:
    """Intersection over union of the two boxes; 0 where there is none or the label is wrong."""
    try:
        found = gl.parse_boxes(reply)
    except ValueError:
        return 0.0
    (right,) = gl.parse_boxes(expected)
    if len(found) != 1 or found[0].label != right.label:
        return 0.0
    a, b = found[0], right
    high = min(a.bottom, b.bottom) - max(a.top, b.top)
    wide = min(a.right, b.right) - max(a.left, b.left)
    shared = max(0.0, high) * max(0.0, wide)
    areas = sum((x.bottom - x.top) * (x.right - x.left) for x in (a, b))
    return shared / (areas - shared) if areas > shared else 0.0


def percent(right: list[bool]) -> float:
    return round(100 * sum(right) / len(right), 1)


def score(task: str, replies: list[str], expected: list[str]) -> dict[str, float]:
    if task != "box":
        return {task: percent([a == b for a, b in zip(replies, expected, strict=True)])}
    overlaps = np.array([overlap(a, b) for a, b in zip(replies, expected, strict=True)])
    return {
        "box": percent((overlaps >= 0.5).tolist()),
        "box_overlap": round(100 * float(overlaps.mean()), 1),
    }


def rows_of(model: Any, group: str, count: int) -> dict[str, list[tuple[Any, str, str]]]:
    """For each task `count` times the soft tokens of a held-out medium, question and answer."""
    kind, shapes = GROUPS[group]
    found: dict[str, list[tuple[Any, str, str]]] = {task: [] for task in TASKS[kind]}
    for sample in media_corpus.stream(1, kind, held_out=True):
        if shapes and len(sample.marks) != shapes:
            continue
        wanted = [turn for turn in sample.turns if len(found[turn[0]]) < count]
        if wanted:
            tokens = encoded(model, sample)
            for task, question, answer in wanted:
                found[task].append((tokens, question, answer))
        if min(map(len, found.values())) == count:
            break
    return found


def evaluate(folder: Path, count: int, show: int) -> dict[str, Any]:
    model = gl.load(str(folder), dtype="float32")
    scores: dict[str, dict[str, float]] = {}
    for group, (kind, _) in GROUPS.items():
        scores[group] = {}
        for task, rows in rows_of(model, group, count).items():
            media, questions, expected = map(list, zip(*rows, strict=True))
            replies = ask(model, kind, media, questions)
            scores[group] |= score(task, replies, expected)
            wrong = [(a, b) for a, b in zip(replies, expected, strict=True) if a != b]
            for reply, right in wrong[:show]:
                print(f"  {reply!r}, expected {right!r}")
            print(f"{group}, {task}: {score(task, replies, expected)}", flush=True)
    return dict(
        checkpoint=folder.name,
        count=count,
        accuracy=scores,
        budgets=by_budget(model, count),
        empty=empties(model, count // 2),
        parameters={part: parameters(model, part) for part in PARTS},
    )


PARTS = {
    "text decoder": ("language_model.",),
    "vision tower": ("vision_tower.", "embed_vision."),
    "audio tower": ("audio_tower.", "embed_audio."),
}


def parameters(model: Any, part: str) -> int:
    """How many parameters a part has; its buffers (bounds, layer_scalar) are not counted."""
    buffers = ("_min", "_max", "layer_scalar")
    return sum(
        int(np.prod(stored.info.shape))
        for name, stored in model.checkpoint.tensors.items()
        if name.removeprefix("model.").startswith(PARTS[part]) and not name.endswith(buffers)
    )


def by_budget(model: Any, count: int) -> dict[str, float]:
    """Accuracy of the descriptions of held-out pictures of one shape, by max_soft_tokens."""
    stream = (s for s in media_corpus.stream(2, "image", held_out=True) if len(s.marks) == 1)
    samples = list(itertools.islice(stream, count))
    expected = [sample.turns[0][2] for sample in samples]
    questions = [sample.turns[0][1] for sample in samples]
    found = {}
    for budget in BUDGETS:
        replies = ask(model, "image", [encoded(model, s, budget) for s in samples], questions)
        found[str(budget)] = score("describe", replies, expected)["describe"]
        print(f"{budget} soft tokens: {found[str(budget)]}", flush=True)
    return found


def empties(model: Any, count: int) -> dict[str, float]:
    """Accuracy on pictures and sounds with nothing in them (their noise and grounds are new)."""
    found = {}
    for kind in ("image", "audio"):
        stream = (s for s in media_corpus.stream(3, kind) if not s.key)
        samples = list(itertools.islice(stream, count))
        rows = [(encoded(model, s), *s.turns[0][1:]) for s in samples]
        media, questions, expected = map(list, zip(*rows, strict=True))
        found[kind] = score("describe", ask(model, kind, media, questions), expected)["describe"]
        print(f"{kind} with nothing in it: {found[kind]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200, help="held-out media per task")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers per task")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    report = evaluate(args.folder, args.count, args.show)
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
