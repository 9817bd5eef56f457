"""Trains the three demo checkpoints with transformers' Gemma 4 classes.

    python scripts/demo_models/train.py edge --minutes 40 --out /tmp/demo/edge

Runs on one thread. Writes a complete bfloat16 checkpoint to --out every few minutes, by rename, so
that it is always whole.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import corpus
import tokenizer
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, GenerationConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

VOCAB_SIZE = 1024
ROW = 192  # tokens of one packed row
IGNORED = -100
MEL_BANDS = 64  # of demo:media; released models have 128, at four times the cost

WITH_EMPTY_THOUGHT = ("moe", "dense")

S, FULL = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    vocab_size_per_layer_input=VOCAB_SIZE,
    num_attention_heads=4,
    head_dim=32,
    global_head_dim=64,
    sliding_window=32,
    max_position_embeddings=8192,
    final_logit_softcapping=30.0,
    hidden_size_per_layer_input=0,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
SHAPES: dict[str, dict[str, Any]] = {
    # E2B: five layers own keys and values; five read the last of their kind, with a double MLP.
    "edge": dict(
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=10,
        layer_types=([S] * 4 + [FULL]) * 2,
        num_key_value_heads=1,
        num_kv_shared_layers=5,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
    ),
    # 26B-A4B: experts beside a dense MLP; full layers have values = keys.
    "moe": dict(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        layer_types=([S] * 2 + [FULL]) * 2,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=16,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    # 31B: dense; full layers have values = keys.
    "dense": dict(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        layer_types=([S] * 2 + [FULL]) * 2,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
    ),
    # E2B with eyes and ears: six of edge's layers, and a window that holds a picture.
    "media": dict(
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=6,
        layer_types=([S] * 2 + [FULL]) * 2,
        num_key_value_heads=1,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
        sliding_window=128,
    ),
}
TOWERS: dict[str, dict[str, Any]] = {
    "media": dict(
        vision_config=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            position_embedding_size=256,
            use_clipped_linears=True,
        ),
        audio_config=dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            subsampling_conv_channels=[MEL_BANDS, 8],
            output_proj_dims=96,
        ),
    )
}


class FusedRmsNorm(torch.autograd.Function):
    """x / rms(x) * weight in fewer passes over memory than autograd takes for that formula."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed if weight is None else normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        (grad,) = grads
        normed, scale, weight = ctx.saved_tensors
        product, grad_weight = grad * normed, None
        if weight is None:
            along = product.mean(-1, keepdim=True)
        else:
            grad_weight = product.flatten(0, -2).sum(0)
            along = (product @ weight).unsqueeze(-1).div_(normed.shape[-1])
            grad = grad * weight
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale), grad_weight, None


def fast_norms() -> None:
    """Replaces transformers' RMSNorm for training; what is saved does not change."""
    Gemma4RMSNorm.forward = lambda self, x: FusedRmsNorm.apply(
        x, self.weight if self.with_scale else None, self.eps
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz steps, for matrices [..., out, in].

    After K. Jordan's Muon (2024).
    """

    def __init__(self, params: list[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(tuple(p.shape), []).append(p)
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        for shape, params in by_shape.items():
            updates = []
            for p in params:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(average, momentum))
            x = torch.stack(updates)
            tall = shape[-2] > shape[-1]
            x = x.mT if tall else x
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for _ in range(5):  # quintic iteration that sends singular values near 1
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = x.mT if tall else x
            for p, update in zip(params, x * max(1.0, shape[-2] / shape[-1]) ** 0.5, strict=True):
                p.add_(update, alpha=-lr)


def make_config(name: str) -> Gemma4Config:
    ids = tokenizer.ID
    return Gemma4Config(
        text_config=COMMON | SHAPES[name],
        **TOWERS.get(name, dict(vision_config=None, audio_config=None)),
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        audio_token_id=ids["<|audio|>"],
        video_token_id=ids["<|video|>"],
        eos_token_id=[ids["<eos>"], ids["<turn|>"]],
        bos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def make_model(name: str, seed: int) -> Gemma4ForConditionalGeneration:
    torch.manual_seed(seed)
    config = make_config(name)
    config._attn_implementation = {"": "sdpa", "audio_config": "eager"}
    model = Gemma4ForConditionalGeneration(config).float()
    for key, weight in model.named_parameters():
        if key.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weight, weight.numel() ** -0.25)  # scores start at unit scale
        elif key.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            torch.nn.init.constant_(weight, 0.5)
        elif weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.05 if "embed" in key else weight.shape[-1] ** -0.5)
    for layer in model.model.language_model.layers:
        layer.layer_scalar.fill_(0.9375)  # not trained; unlike 1, forgetting it shows
    return model


def take_over(model: Gemma4ForConditionalGeneration, checkpoint: Path) -> None:
    """Loads the tensors that both have. A new expert branch starts small: little is lost."""
    known = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({key: value.float() for key, value in known.items()}, strict=False)
    for key, weight in model.named_parameters():
        if key.endswith("post_feedforward_layernorm_2.weight") and key not in known:
            torch.nn.init.constant_(weight, 0.3)


def encode(sample: corpus.Sample, tok: Any) -> tuple[list[int], list[int]]:
    """Token ids, and the same ids as labels with IGNORED where the model does not write."""
    ids = [tokenizer.ID["<bos>"]]
    if sample.messages:
        ids = tok.apply_chat_template(
            sample.messages,
            tools=sample.tools or None,
            enable_thinking=sample.thinking,
            add_generation_prompt=True,
            return_dict=False,
        )
    labels = [IGNORED] * len(ids)
    for i, part in enumerate(sample.parts):
        new = tok.encode(part, add_special_tokens=False)
        ids = ids + new
        labels = labels + (new if i % 2 == 0 else [IGNORED] * len(new))
    if sample.task.startswith("repeated"):  # the first half cannot be known
        known = len(ids) // 2
        labels = [IGNORED] * known + labels[known:]
    return ids, labels


def batches(
    tok: Any, rows: int, seed: int, shares: dict[str, float]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Packed ids, labels, positions and documents [rows, ROW]; attention stays in a document."""
    samples = corpus.stream(seed, shares=shares)
    while True:
        packed: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(rows)]
        room = [ROW] * rows
        misses = 0
        while misses < 8:
            ids, labels = encode(next(samples), tok)
            best = min(
                (i for i in range(rows) if room[i] >= len(ids)), key=room.__getitem__, default=None
            )
            if best is None:
                misses += 1
                continue
            packed[best].append((ids, labels))
            room[best] -= len(ids)
        ids_t = torch.zeros(rows, ROW, dtype=torch.long)
        labels_t = torch.full((rows, ROW), IGNORED)
        positions, documents = torch.zeros_like(ids_t), torch.full_like(ids_t, -1)
        for r, row in enumerate(packed):
            at = 0
            for n, (ids, labels) in enumerate(row):
                span = slice(at, at + len(ids))
                ids_t[r, span] = torch.tensor(ids)
                labels_t[r, span] = torch.tensor(labels)
                positions[r, span] = torch.arange(len(ids))
                documents[r, span] = n
                at += len(ids)
        yield ids_t, labels_t, positions, documents


def masks(documents: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """Additive masks [rows, 1, ROW, ROW] of full and sliding layers."""
    place = torch.arange(documents.shape[1])
    distance = place[:, None] - place[None, :]
    same = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
    near = same & (distance < window)
    zero, low = torch.tensor(0.0), torch.tensor(-1e9)
    return {FULL: torch.where(same, zero, low)[:, None], S: torch.where(near, zero, low)[:, None]}


def balance_loss(probs: torch.Tensor, top_k: int) -> torch.Tensor:
    """Experts x sum over experts of (share of choices) x (mean probability); 1 when even."""
    experts = probs.shape[-1]
    chosen = torch.zeros(experts).index_add_(
        0, probs.topk(top_k, dim=-1).indices.flatten(), torch.ones(probs.shape[0] * top_k)
    )
    return experts * (chosen / chosen.sum() * probs.mean(0)).sum()


def save(model: Gemma4ForConditionalGeneration, tok: Any, name: str, out: Path) -> None:
    """A complete bfloat16 checkpoint, put in place by rename."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {
        key: value.to(torch.bfloat16)
        for key, value in model.state_dict().items()
        if key != "lm_head.weight"
    }
    config = make_config(name)
    copy = Gemma4ForConditionalGeneration(config).to(torch.bfloat16)
    copy.load_state_dict(state, strict=False)
    ids = tokenizer.ID
    copy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=64,
        top_p=0.95,
        bos_token_id=ids["<bos>"],
        pad_token_id=ids["<pad>"],
        eos_token_id=[ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
    )
    copy.save_pretrained(temporary)
    (temporary / "model.safetensors").chmod(0o644)
    tokenizer.save(tok, temporary, empty_thought=name in WITH_EMPTY_THOUGHT)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[name for name in SHAPES if name not in TOWERS])
    parser.add_argument("--minutes", type=float, default=40, help="wall clock of the training")
    parser.add_argument("--steps", type=int, default=0, help="stop after this many steps instead")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6, help=f"rows of {ROW} tokens in a step")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the learning rates")
    parser.add_argument(
        "--start", type=Path, help="checkpoint to take equal tensors from (moe starts from dense)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share", nargs="*", default=[], metavar="TASK=N", help="a task's share in the mixture"
    )
    args = parser.parse_args()
    shares = {task: float(share) for task, share in (item.split("=") for item in args.share)}
    if unknown := set(shares) - set(corpus.TASKS):
        parser.error(f"--share: no task {sorted(unknown)}; there are {list(corpus.TASKS)}")
    torch.set_num_threads(1)

    bare = tokenizer.build(VOCAB_SIZE)
    tok = tokenizer.wrap(bare, empty_thought=args.name in WITH_EMPTY_THOUGHT)
    model = make_model(args.name, args.seed)
    if args.start:
        take_over(model, args.start)
    fast_norms()
    text = model.model.language_model
    print(f"{args.name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    router_probs: list[torch.Tensor] = []
    for layer in text.layers:
        if hasattr(layer, "router"):
            layer.router.register_forward_hook(
                lambda module, inputs, output: router_probs.append(output[0])
            )

    hidden = [p for key, p in text.named_parameters() if p.dim() > 1 and "embed" not in key]
    others = [p for key, p in text.named_parameters() if p.dim() == 1 or "embed" in key]
    muon = Muon(hidden, lr=0.02)
    adam = torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    groups = [
        (group, group["lr"]) for optimizer in (muon, adam) for group in optimizer.param_groups
    ]

    began = saved = time.time()
    step = tokens = 0
    for ids, labels, positions, documents in batches(tok, args.rows, args.seed + 1, shares):
        done = step / args.steps if args.steps else (time.time() - began) / (60 * args.minutes)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 40)
        for group, lr in groups:
            group["lr"] = args.scale * lr * warm * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))
        router_probs.clear()
        states = text(
            input_ids=ids,
            attention_mask=masks(documents, COMMON["sliding_window"]),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        target = labels[:, 1:]
        wanted = target != IGNORED
        logits = F.linear(states[:, :-1][wanted], text.embed_tokens.weight)
        cap = COMMON["final_logit_softcapping"]
        loss = F.cross_entropy(cap * torch.tanh(logits / cap), target[wanted])
        total = loss
        if router_probs:
            balance = torch.stack(
                [balance_loss(p, SHAPES[args.name]["top_k_experts"]) for p in router_probs]
            ).mean()
            total = loss + 0.01 * balance
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += int((documents >= 0).sum())
        if step % 25 == 0:
            line = dict(
                step=step,
                minutes=round((time.time() - began) / 60, 2),
                tokens=tokens,
                loss=round(loss.item(), 4),
                norm=round(norm.item(), 3),
            )
            if router_probs:
                line["balance"] = round(balance.item(), 3)
            print(json.dumps(line), flush=True)
        if time.time() - saved > 180:
            save(model, bare, args.name, args.out)
            saved = time.time()
    save(model, bare, args.name, args.out)
    print(f"saved {args.out} after {step} steps, {tokens:,} tokens", flush=True)


if __name__ == "__main__":
    main()
