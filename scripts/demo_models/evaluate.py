"""Measures the shipped demo checkpoints on held-out prompts, for the tables of their card.

    python scripts/demo_models/evaluate.py python/gemloupe/demo/edge --json /tmp/edge.json

The bfloat16 weights are computed with in float32, as gemloupe does. Answers are greedy, and right
only if the visible text equals the expected one character by character.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import corpus
import torch
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

GREEDY_TASKS = [
    name
    for name in corpus.TASKS
    if name not in ("story", "talk", "repeated_words", "repeated_long", "tool", "giving")
]


class Checkpoint:
    def __init__(self, folder: Path) -> None:
        self.tok = AutoTokenizer.from_pretrained(folder)
        self.model = Gemma4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def prompt(self, sample: corpus.Sample) -> str:
        if not sample.messages:
            return "<bos>"
        return self.tok.apply_chat_template(
            sample.messages,
            tools=sample.tools or None,
            enable_thinking=sample.thinking,
            add_generation_prompt=True,
            tokenize=False,
        )

    @torch.no_grad()
    def greedy(self, prompts: list[str], max_new_tokens: int = 110, batch: int = 200) -> list[str]:
        texts = []
        for i in range(0, len(prompts), batch):
            inputs = self.tok(
                prompts[i : i + batch], return_tensors="pt", padding=True, add_special_tokens=False
            )
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
            )
            texts += self.tok.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False
            )
        return [text.replace("<pad>", "") for text in texts]

    @torch.no_grad()
    def forward(self, text: str, **options: Any) -> tuple[torch.Tensor, Any]:
        ids = self.tok(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return ids[0], self.model(input_ids=ids, **options)


def visible(text: str) -> str:
    """What a user sees of a model turn: no thought, no stop token."""
    text = text.rsplit("<channel|>", 1)[-1]
    for stop in ("<turn|>", "<eos>"):
        text = text.split(stop)[0]
    return text


def held_out(task: str, count: int, seed: int = 1) -> list[corpus.Sample]:
    return list(itertools.islice(corpus.stream(seed, held_out=True, task=task), count))


def accuracy(right: list[bool]) -> float:
    return round(100 * sum(right) / len(right), 1)


def task_accuracy(checkpoint: Checkpoint, task: str, prompts: int, seed: int = 1) -> float:
    samples = [
        s for s in held_out(task, prompts * (2 if task == "capital" else 1), seed) if s.messages
    ][:prompts]
    replies = checkpoint.greedy([checkpoint.prompt(s) for s in samples])
    return accuracy(
        [visible(r) == visible(s.parts[0]) for r, s in zip(replies, samples, strict=True)]
    )


def tool_accuracy(checkpoint: Checkpoint, prompts: int) -> dict[str, float]:
    samples = held_out("tool", prompts)
    starts = [checkpoint.prompt(s) for s in samples]
    calls = checkpoint.greedy(starts)
    starts = [p + s.parts[0] + s.parts[1] for p, s in zip(starts, samples, strict=True)]
    replies = checkpoint.greedy(starts)
    return {
        "tool_call": accuracy([c == s.parts[0] for c, s in zip(calls, samples, strict=True)]),
        "tool_answer": accuracy(
            [visible(r) == visible(s.parts[2]) for r, s in zip(replies, samples, strict=True)]
        ),
    }


def raw_text_scores(checkpoint: Checkpoint, prompts: int) -> dict[str, float]:
    """Indirect objects, next tokens in a sequence's repetition, and perplexity on stories."""
    givings = held_out("giving", prompts)
    replies = checkpoint.greedy([f"<bos>{s.key}" for s in givings], max_new_tokens=4)
    scores = {
        "giving": accuracy([r.startswith(s.answer) for r, s in zip(replies, givings, strict=True)])
    }

    for task in ("repeated_words", "repeated_long"):
        right: list[bool] = []
        for s in held_out(task, prompts):
            ids, out = checkpoint.forward(f"<bos>{s.key} {s.key}")
            # The first repeated token can't be known: it is what starts the repetition.
            start = len(checkpoint.tok(f"<bos>{s.key}", add_special_tokens=False)["input_ids"]) + 1
            right += (out.logits[0, start - 1 : -1].argmax(-1) == ids[start:]).tolist()
        scores[task] = accuracy(right)

    loss = tokens = 0.0
    for s in held_out("story", prompts):
        ids, out = checkpoint.forward(f"<bos>{s.key}<eos>")
        loss += torch.nn.functional.cross_entropy(
            out.logits[0, :-1], ids[1:], reduction="sum"
        ).item()
        tokens += len(ids) - 1
    scores["story_perplexity"] = round(math.exp(loss / tokens), 2)
    return scores


def induction_heads(
    checkpoint: Checkpoint, length: int, sequences: int = 20
) -> list[tuple[float, int, int]]:
    """(score, layer, head), best first.

    The score is the attention of a repeated random token to the token after its first occurrence.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = checkpoint.tok.get_vocab()
    words = [vocab[f"▁{word}"] for word in corpus.WORDS if f"▁{word}" in vocab]
    total = None
    for _ in range(sequences):
        half = torch.tensor(words)[torch.randperm(len(words), generator=generator)[:length]]
        ids = torch.cat([torch.tensor([checkpoint.tok.bos_token_id]), half, half])[None]
        with torch.no_grad():
            attentions = checkpoint.model(input_ids=ids, output_attentions=True).attentions
        rows = torch.arange(length + 1, 2 * length + 1)
        scores = torch.stack([a[0][:, rows, rows - length + 1].mean(-1) for a in attentions])
        total = scores if total is None else total + scores
    assert total is not None
    ranked = [
        (round(float(total[i, h]) / sequences, 3), i, h)
        for i in range(len(total))
        for h in range(total.shape[1])
    ]
    return sorted(ranked, reverse=True)


def token_class(piece: str) -> str:
    if piece.startswith("<") and piece.endswith(">") and len(piece) > 2:
        return "special"
    if piece.isdigit():
        return "digit"
    if any(c.isalpha() for c in piece):
        return "word"
    return "mark"  # punctuation, signs, newline, space


def information(pairs: Counter[tuple[Any, Any]]) -> float:
    """Mutual information of the two members of the pairs, in bits."""
    total = sum(pairs.values())
    left, right = Counter[Any](), Counter[Any]()
    for (a, b), n in pairs.items():
        left[a] += n
        right[b] += n
    return sum(
        n / total * math.log2(n * total / (left[a] * right[b])) for (a, b), n in pairs.items()
    )


def expert_table(checkpoint: Checkpoint, texts: int = 300) -> list[dict[str, Any]]:
    """Per layer: on what each expert is chosen; bits it tells of the token's class and identity."""
    layers = checkpoint.model.model.language_model.layers
    chosen: list[torch.Tensor] = []
    hooks = [
        x.router.register_forward_hook(lambda m, i, out: chosen.append(out[2])) for x in layers
    ]
    by_class = [Counter[tuple[Any, Any]]() for _ in layers]
    by_token = [Counter[tuple[Any, Any]]() for _ in layers]
    for s in itertools.islice(corpus.stream(2, held_out=True), texts):
        chosen.clear()
        ids, _ = checkpoint.forward(checkpoint.prompt(s) + "".join(s.parts))
        pieces = checkpoint.tok.convert_ids_to_tokens(ids)
        for layer, experts in enumerate(chosen):
            for piece, row in zip(pieces, experts.tolist(), strict=True):
                for expert in row:
                    by_class[layer][expert, token_class(piece)] += 1
                    by_token[layer][expert, piece] += 1
    for hook in hooks:
        hook.remove()
    report = []
    experts_total = checkpoint.model.config.text_config.num_experts
    for layer, (classes, tokens) in enumerate(zip(by_class, by_token, strict=True)):
        rows = []
        for expert in range(experts_total):
            counts = {c: classes[expert, c] for c in ("digit", "word", "mark", "special")}
            total = max(1, sum(counts.values()))
            top = Counter(
                {piece: n for (e, piece), n in tokens.items() if e == expert}
            ).most_common(4)
            rows.append(
                dict(
                    expert=expert,
                    load=round(100 * total / sum(classes.values()), 1),
                    share={c: round(100 * n / total) for c, n in counts.items()},
                    top=[piece for piece, _ in top],
                )
            )
        report.append(
            dict(
                layer=layer,
                class_bits=round(information(classes), 3),
                token_bits=round(information(tokens), 3),
                experts=rows,
            )
        )
    return report


def evaluate(folder: Path, prompts: int) -> dict[str, Any]:
    checkpoint = Checkpoint(folder)
    accuracies: dict[str, float] = {}
    for task in GREEDY_TASKS:
        accuracies[task] = task_accuracy(checkpoint, task, prompts)
        print(f"{task}: {accuracies[task]}", flush=True)
    accuracies |= tool_accuracy(checkpoint, prompts) | raw_text_scores(checkpoint, prompts)
    report: dict[str, Any] = dict(
        checkpoint=folder.name,
        prompts=prompts,
        accuracy=accuracies,
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        induction={str(n): induction_heads(checkpoint, n)[:3] for n in (24, 60)},
    )
    if checkpoint.model.config.text_config.enable_moe_block:
        report["experts"] = expert_table(checkpoint)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts per task")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = evaluate(args.folder, args.prompts)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
