"""Writes the demo models' card from the reports of evaluate.py and evaluate_media.py.

python scripts/demo_models/card.py edge.json moe.json dense.json media.json \\
    > python/gemloupe/demo/README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "python/gemloupe/demo"

WHAT = {
    "sum_2_digits": "two-digit sum, steps in the thought",
    "sum_2_digits_shown": "two-digit sum, thinking off (steps in the answer)",
    "difference_2_digits": "two-digit difference, steps in the thought",
    "difference_2_digits_shown": "two-digit difference, thinking off",
    "sum_3_digits": "three-digit sum, steps in the thought",
    "sum_1_digits_direct": 'one-digit sum, "Only the answer."',
    "sum_2_digits_direct": 'two-digit sum, "Only the answer."',
    "tool_call": "calculator call, exact",
    "tool_answer": "answer after the calculator's result",
    "copy_words": "copy 3-10 words",
    "copy_digits": "copy 4-12 digits",
    "sort_digits": "sort 3-7 digits",
    "sort_words": "sort 2-5 words",
    "lookup": "find a fact stated in the prompt",
    "capital": "capital of a country (unseen wording)",
    "giving": "raw text: indirect object after two names",
    "repeated_words": "raw text: next token in the repetition of 6-30 random words",
    "repeated_long": "the same, sequences of 33-80 words (beyond the window)",
    "story_perplexity": "raw stories: perplexity per token (not a percentage)",
}

PICTURES = {
    "describe": '"Describe the picture."',
    "colour": '"What colour is the circle?"',
    "place": '"Where is the circle?"',
    "shape": '"What is red?"',
    "box": '"Detect the circle."',
    "box_overlap": "the same: mean overlap (intersection over union)",
}
OTHERS = {
    ("sounds", "describe"): 'sound: "Describe the sound."',
    ("sounds", "count"): 'sound: "How many beeps are there?"',
    ("sounds", "transcribe"): 'sound: "Transcribe the sound."',
    ("videos", "describe"): 'video: "Describe the video."',
    ("videos", "when"): 'video: "When does it turn blue?"',
}


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def shapes(reports: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, report in reports.items():
        parameters = report["parameters"]
        if name == "media":
            parameters = sum(parameters.values())
        text = json.loads((DEMO / name / "config.json").read_text())["text_config"]
        kinds = "".join("F" if kind == "full_attention" else "S" for kind in text["layer_types"])
        size = sum(f.stat().st_size for f in (DEMO / name).iterdir())
        rows.append(
            [f"`demo:{name}`", f"{parameters:,}", f"{size / 1e6:.2f} MB", kinds]
            + [text["hidden_size"], text["intermediate_size"], text["sliding_window"]]
        )
    head = ["model", "parameters", "files", "layers", "hidden", "MLP", "window"]
    return table(head, rows)


def accuracies(reports: dict[str, dict[str, Any]]) -> str:
    rows = [
        [what, *(report["accuracy"][key] for report in reports.values())]
        for key, what in WHAT.items()
    ]
    return table(["task", *(f"`demo:{name}`" for name in reports)], rows)


def media_accuracies(report: dict[str, Any]) -> str:
    found = report["accuracy"]
    groups = ["one shape", "two shapes"]
    pictures = [
        [what, *(found[group][task] for group in groups)] for task, what in PICTURES.items()
    ]
    others = [[what, found[group][task]] for (group, task), what in OTHERS.items()]
    others += [
        [f'"Describe the picture.", one shape, of at most {budget} soft tokens', value]
        for budget, value in report["budgets"].items()
    ]
    others += [
        ["a picture with nothing in it described", report["empty"]["image"]],
        ["a sound with nothing in it described", report["empty"]["audio"]],
    ]
    return table(["picture", *groups], pictures) + "\n\n" + table(["task", "right"], others)


def induction(reports: dict[str, dict[str, Any]]) -> str:
    rows = [
        [f"`demo:{name}`", length, *(f"{score} (layer {i}, head {h})" for score, i, h in best)]
        for name, report in reports.items()
        for length, best in report["induction"].items()
    ]
    return table(["model", "sequence length", "best", "second", "third"], rows)


def experts(report: dict[str, Any]) -> str:
    layers = report["experts"]
    rows = [[x["layer"], x["class_bits"], x["token_bits"]] for x in layers]
    bits = table(["layer", "bits about the class", "bits about the token"], rows)
    best = max(layers, key=lambda x: x["class_bits"])
    rows = [
        [x["expert"], f"{x['load']} %"]
        + [f"{x['share'][c]} %" for c in ("digit", "word", "mark", "special")]
        + [" ".join(f"`{piece}`".replace("\n", "\\n").replace("|", "\\|") for piece in x["top"])]
        for x in best["experts"]
    ]
    head = ["expert", "load", "digits", "words", "marks", "special", "most frequent tokens"]
    return f"{bits}\n\nLayer {best['layer']}, where the experts differ most:\n\n{table(head, rows)}"


def main() -> None:
    reports = {}
    for path in sys.argv[1:]:
        report = json.loads(Path(path).read_text())
        reports[report["checkpoint"]] = report
    text = {name: report for name, report in reports.items() if name != "media"}
    print(
        (HERE / "card.md")
        .read_text()
        .format(
            shapes=shapes(reports),
            accuracies=accuracies(text),
            media=media_accuracies(reports["media"]),
            media_parts=", ".join(
                f"{part} {count:,}" for part, count in reports["media"]["parameters"].items()
            ),
            media_count=reports["media"]["count"],
            induction=induction(text),
            experts=experts(reports["moe"]),
            prompts=reports["edge"]["prompts"],
        ),
        end="",
    )


if __name__ == "__main__":
    main()
