"""Quantised weights are covered by the equalities of float32; activations cost less than weights.

A quantised product has one accumulation contract (kernels/quant_table.h), so a model whose every
matrix is quantised gives the same bits in prefill and decode. Tensors that stay float (a GGUF
file's router, all of them with dtype "float32" and "bfloat16") are multiplied by oneDNN in long
passes: there each product is within the bound of its summation and, for bfloat16, of its operands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from parity_checks import assert_logits_close

import gemloupe as gl
from gemloupe import _core
from gguf_files import SIZES, all_of, write_gguf
from tiny_models import make_tiny, random_ids, save_tiny

VARIANTS = ("e2b", "26b", "31b")
GGUFS = {"Q4_0": Type.Q4_0, "Q8_0": Type.Q8_0, "Q4_K": Type.Q4_K, "Q5_K": Type.Q5_K}
QUANTISED = ("int8", "int4", *GGUFS)
IDS = random_ids(131)
LENGTHS = (1, 5, 23, 2, 66, 13, 31, 8)
EPS32, EPS16 = 2.0**-24, 2.0**-9  # half a unit in the last place of float32 and bfloat16


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, tiny) -> Callable[..., gl.Model]:
    files: dict[tuple[str, str], Path] = {}

    def get(variant: str, dtype: str, **arguments) -> gl.Model:
        if dtype not in GGUFS:
            return gl.load(tiny(variant, dtype="bfloat16")[1], dtype=dtype, **arguments)
        if (variant, dtype) not in files:
            folder = tmp_path_factory.mktemp(f"{variant}-{dtype}")
            save_tiny(make_tiny(variant, **SIZES[variant]), folder)
            files[variant, dtype] = folder / f"{dtype}.gguf"
            write_gguf(files[variant, dtype], folder, all_of(GGUFS[dtype]))
        return gl.load(files[variant, dtype], **arguments)

    return get


@pytest.mark.core
@pytest.mark.parametrize("activations", ["auto", "float32"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_of_quantised_weights_gives_the_bits_of_decode(load, variant, dtype, activations):
    model = load(variant, dtype, activations=activations)
    prefill = model.run(IDS, logits="all").logits
    assert np.isfinite(prefill).all()
    for chunk in (1, 8, 33):
        assert np.array_equal(model.run(IDS, logits="all", chunk=chunk).logits, prefill), chunk


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_threads_give_the_bits_of_one(load, variant, dtype):
    one, two = (
        load(variant, dtype, threads=threads).run(IDS, logits="all", chunk=8).logits
        for threads in (1, 2)
    )
    assert np.array_equal(one, two)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoded_row_in_a_batch_gives_the_bits_of_the_row_alone(load, variant, dtype):
    model = load(variant, dtype)
    options = {"max_new_tokens": 6, "temperature": 0, "logprobs": 4}
    prompts = [random_ids(length, seed=length) for length in LENGTHS]
    caches = [model.new_cache(max_tokens=80) for _ in prompts]
    for ids, cache in zip(prompts, caches, strict=True):
        model.run(ids, cache=cache)
    forks = [cache.fork() for cache in caches]
    tokens = [[10 + row] for row in range(len(prompts))]
    together = model.generate(tokens, cache=caches, **options)
    for row, (token, fork) in enumerate(zip(tokens, forks, strict=True)):
        alone = model.generate(token, cache=fork, **options)
        assert list(together[row].ids) == list(alone.ids), row
        assert together[row].logprobs == alone.logprobs, row


def products_differ_within_bounds(model: gl.Model, name: str, source: str, point: str) -> None:
    """Compares one product of a prefill with decode's, of the same left side."""
    long, short = (model.run(IDS, capture=[source, point], chunk=chunk) for chunk in (512, 1))
    assert np.array_equal(long[source], short[source])
    x = np.abs(long[source].astype(np.float64))
    weight = np.abs(model.weights[name].astype(np.float64))
    terms = x @ weight.T
    # Each of the two sums is off by at most k roundings of the sum of its terms' sizes.
    bound = 2 * x.shape[1] * EPS32 * terms
    if model.dtype == "bfloat16" and _core.detected_isa() in ("avx512_bf16", "amx"):
        bound = bound + EPS16 * (1 + EPS16) * terms
    got = np.abs(long[point].reshape(terms.shape) - short[point].reshape(terms.shape))
    assert (got <= bound).all(), f"{(got / bound).max():.2f} of the bound"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_float_product_of_prefill_is_within_its_bound_of_decode(load, variant, dtype):
    model = load(variant, dtype)
    name = "layers.0.self_attn.q_proj.weight"
    name = next(key for key in model.weights if key.endswith(name))
    products_differ_within_bounds(model, name, "layers.0.attn.norm", "layers.0.attn.q_proj")


@pytest.mark.parametrize("dtype", GGUFS)
def test_a_float_router_among_quantised_weights_is_within_its_bound_of_decode(load, dtype):
    model = load("26b", dtype)
    name = next(key for key in model.weights if key.endswith("layers.0.router.proj.weight"))
    products_differ_within_bounds(model, name, "layers.0.router.norm", "layers.0.router.logits")


TEXTS = (
    "What is 27 + 45?",
    "Write a sentence about a river and a bird.",
    "Sort these numbers: 9 3 7 1 8 2.",
    "Repeat after me: the quick brown fox jumps over the lazy dog.",
    "Which letter comes after q?",
)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Mean KL(p ‖ q) over rows of logits [T, V]."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    a, b = log_softmax(p), log_softmax(q)
    return float((np.exp(a) * (a - b)).sum(axis=-1).mean())


@pytest.fixture(scope="module")
def added_errors() -> Callable[[str, str], tuple[np.ndarray, np.ndarray]]:
    """For a demo model and dtype: what weights add to float32, and int8 activations to that.

    KL [2], and the error of resid_post relative to its norm, by layer [L, 2].
    """
    found: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    def measure(demo: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        shared = {"kv_dtype": "float32", "embed_scale": "float32"}
        exact = gl.load(f"demo:{demo}", dtype="float32", **shared)
        floats, auto = (
            gl.load(f"demo:{demo}", dtype=dtype, activations=activations, **shared)
            for activations in ("float32", "auto")
        )
        points = [f"layers.{i}.resid_post" for i in range(exact.config.text.num_hidden_layers)]
        kls, errors = [], []
        for text in TEXTS:
            answer = exact.chat(text, max_new_tokens=48, temperature=0)
            ids = [*answer.prompt.ids.tolist(), *answer.ids.tolist()]
            x, f, a = (
                model.run(ids, logits="all", capture=points) for model in (exact, floats, auto)
            )
            kls.append([divergence(x.logits, f.logits), divergence(f.logits, a.logits)])
            pairs = [(np.linalg.norm(x[p] - f[p]), np.linalg.norm(f[p] - a[p])) for p in points]
            norms = np.array([np.linalg.norm(x[p]) for p in points])
            errors.append(np.array(pairs) / norms[:, None])
        return np.mean(kls, axis=0), np.mean(errors, axis=0)

    def get(demo: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        if (demo, dtype) not in found:
            found[demo, dtype] = measure(demo, dtype)
        return found[demo, dtype]

    return get


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("demo", ["edge", "moe", "dense"])
def test_int8_activations_diverge_less_than_the_weights_they_meet(added_errors, demo, dtype):
    of_weights, of_activations = added_errors(demo, dtype)[0]
    assert 0 < of_activations < of_weights


EVEN = pytest.mark.xfail(
    strict=True,
    reason="both operands have 8 bits in groups of 32: activations cost up to 1.06 of the weights",
)


@pytest.mark.parametrize(
    ("demo", "dtype"),
    [(demo, "int4") for demo in ("edge", "moe", "dense")]
    + [("moe", "int8"), ("dense", "int8"), pytest.param("edge", "int8", marks=EVEN)],
)
def test_int8_activations_change_each_layer_less_than_the_weights(added_errors, demo, dtype):
    errors = added_errors(demo, dtype)[1]
    assert (errors[:, 1] < errors[:, 0]).all(), errors.tolist()


LEVELS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
ONE_ISA = """
import sys
import numpy as np
import gemloupe as gl
for activations in ("auto", "float32"):
    options = {"activations": activations, "threads": 1, "kv_dtype": "float32"}
    model = gl.load(sys.argv[1], dtype="int4", **options)
    ids = [(7 * i + 3) % 90 + 60 for i in range(70)]
    sys.stdout.buffer.write(model.run(ids, logits="all").logits.tobytes())
"""


@pytest.mark.parametrize("demo", ["edge", "moe", "dense"])
def test_every_isa_of_this_cpu_computes_int4(demo):
    """Those that share the float kernels give the same bits: quantised products have one contract.

    Norms and softmax differ in the others by float32 roundings. A rounding that makes one int8
    activation another moves the next ones, so two answers are at worst those of independent int8
    roundings: divergences, which are quadratic in the logits, add up.
    """
    levels = LEVELS[: LEVELS.index(_core.detected_isa()) + 1]
    answers = {}
    for isa in levels:
        command = [sys.executable, "-c", ONE_ISA, f"demo:{demo}"]
        done = subprocess.run(
            command, env={**os.environ, "GEMLOUPE_ISA": isa}, capture_output=True, check=True
        )
        auto, floats = np.frombuffer(done.stdout, np.float32).reshape(2, 70, -1)
        answers[isa] = auto, floats
        assert np.isfinite(auto).all()
    last_auto, last_floats = answers[levels[-1]]
    moved = divergence(last_floats, last_auto)
    for isa, (auto, floats) in answers.items():
        if isa.startswith(("avx512", "amx")):
            assert np.array_equal(auto, last_auto), isa
            assert np.array_equal(floats, last_floats), isa
        assert_logits_close(floats, last_floats, isa)
        assert divergence(last_auto, auto) < 2 * moved, isa
