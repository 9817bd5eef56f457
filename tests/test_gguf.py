"""GGUF files: the values, logits, config and token ids of the checkpoint they were made from."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

import gemloupe as gl
from gemloupe import _core, inspect, sizes
from gemloupe.checkpoint import open_checkpoint
from gemloupe.tokenizer import Tokenizer
from gguf_files import SIZES, TYPES, all_of, as_llama_quantize, write_gguf
from tiny_models import make_tiny, random_ids, save_tiny

DEMO = Path(gl.__file__).parent / "demo"
QUANTISED = [t for t in TYPES if t not in (Type.F32, Type.F16, Type.BF16)]
# float32 sums in another order; the tolerance of all parity tests (gemma4.md, K).
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint in float32, of sizes that GGUF's blocks fit, once per variant."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            model = make_tiny(variant, **SIZES[variant])
            made[variant] = save_tiny(model, tmp_path_factory.mktemp(variant), style="released")
        return made[variant]

    return get


@pytest.fixture(scope="module")
def small(folder_of: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole E2B file with a tokenizer, for tests that read or damage it."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_gguf(path, folder_of("e2b"))
    return path


def as_folder(path: Path, config: Path, held: dict[str, np.ndarray]) -> Path:
    """The same values as safetensors in float32."""
    path.mkdir()
    tensors = {name: torch.from_numpy(values.copy()) for name, values in held.items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_bytes((config / "config.json").read_bytes())
    return path


# Values


def fill_with_any_blocks(path: Path, seed: int) -> dict[str, np.ndarray]:
    """Overwrites quantised tensors with random bytes, scales finite; returns all values."""
    scales = {"Q4_0": (18, [0]), "Q8_0": (34, [0]), "Q4_K": (144, [0, 2])}
    scales |= {"Q5_K": (176, [0, 2]), "Q6_K": (210, [208])}
    random = np.random.default_rng(seed)
    values = {}
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.tensor_type.name in scales:
            size, places = scales[tensor.tensor_type.name]
            blocks = random.integers(0, 256, (tensor.data.size // size, size), dtype=np.uint8)
            for place in places:
                blocks[:, place + 1] &= 0xBF  # below 2: no infinity; subnormals, both signs
            tensor.data.reshape(-1)[:] = blocks.reshape(-1)
        values[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type)
    return values


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
def test_every_type_reads_as_the_gguf_package_does(
    kind: Type, dtype: str, folder_of: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, folder_of("26b"), all_of(kind))
    values = fill_with_any_blocks(path, seed=3)
    model = gl.load(path, dtype=dtype)
    for name, stored in (
        ("embed_tokens.weight", "token_embd.weight"),
        ("layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight"),
        ("layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight"),
        ("layers.3.experts.gate_up_proj", "blk.3.ffn_gate_up_exps.weight"),
        ("layers.3.experts.down_proj", "blk.3.ffn_down_exps.weight"),
        ("layers.0.router.scale", "blk.0.ffn_gate_inp.scale"),
        ("layers.0.router.per_expert_scale", "blk.0.ffn_down_exps.scale"),
    ):
        read = model.weights[name]
        assert read.shape == values[stored].shape
        assert np.array_equal(read.view(np.uint32), values[stored].view(np.uint32)), name


def test_the_per_layer_table_stays_in_the_file_and_reads_exactly(
    folder_of: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    # 9 layers of 32: rows are no whole Q6_K blocks, and llama.cpp's fallback is Q8_0.
    write_gguf(path, folder_of("e2b"))
    table = fill_with_any_blocks(path, seed=4)["per_layer_token_embd.weight"]
    model = gl.load(path)
    assert model.weights.info("embed_tokens_per_layer.weight").dtype == "q8_0"
    rows = model.weights.rows("embed_tokens_per_layer.weight", [0, 5, 306])
    assert np.array_equal(rows.view(np.uint32), table[[0, 5, 306]].view(np.uint32))


@pytest.mark.parametrize("variant", SIZES)
def test_the_stored_types_decide_what_the_engine_holds(
    variant: str, folder_of: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, folder_of(variant))
    model = gl.load(path)
    assert model.dtype == "q4_0"
    assert model.weights.info("embed_tokens.weight").dtype == "int6_k"
    assert model.weights.info("layers.0.mlp.up_proj.weight").dtype == "int4"
    assert model.weights.info("layers.0.input_layernorm.weight").dtype == "float32"


# Logits


@pytest.mark.parametrize("variant", SIZES)
@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)
def test_logits_equal_those_of_the_dequantised_checkpoint(
    variant: str, kind: Type, folder_of: Callable, tmp_path: Path
) -> None:
    folder = folder_of(variant)
    held = write_gguf(tmp_path / "x.gguf", folder, all_of(kind))
    reference = gl.load(as_folder(tmp_path / "ref", folder, held), dtype="float32")
    ids = random_ids(30)
    expected = reference.run(ids, logits="all").logits
    got = gl.load(tmp_path / "x.gguf", dtype="float32").run(ids, logits="all").logits
    if kind in (Type.F16, Type.BF16):  # Read as they are stored, by other kernels.
        assert np.abs(got - expected).max() <= TOLERANCE
    else:
        assert np.array_equal(got, expected)
    as_stored = gl.load(tmp_path / "x.gguf", activations="float32", kv_dtype="float32")
    got = as_stored.run(ids, logits="all").logits
    if kind in QUANTISED:
        assert np.abs(got - expected).max() <= TOLERANCE


@pytest.mark.parametrize("variant", SIZES)
def test_a_q4_0_file_generates(variant: str, folder_of: Callable, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", folder_of(variant))
    model = gl.load(tmp_path / "x.gguf")
    out = model.generate(random_ids(9), max_new_tokens=6, temperature=0)
    assert len(out.ids) == 6
    assert not model.tokenizer.loaded


# Config


@pytest.mark.parametrize("variant", SIZES)
def test_metadata_give_the_config_of_the_checkpoint(
    variant: str, folder_of: Callable, tmp_path: Path
) -> None:
    folder = folder_of(variant)
    write_gguf(tmp_path / "x.gguf", folder)
    expected = open_checkpoint(folder).config.text
    assert open_checkpoint(tmp_path / "x.gguf").config.text == expected


def test_one_width_may_be_written_for_every_layer(folder_of: Callable, tmp_path: Path) -> None:
    lists = {"expert_feed_forward_length": [256] * 6, "attention.head_count": [4] * 6}
    write_gguf(tmp_path / "x.gguf", folder_of("26b"), metadata=lists)
    expected = open_checkpoint(folder_of("26b")).config.text
    assert open_checkpoint(tmp_path / "x.gguf").config.text == expected


def test_the_embedding_scale_is_float32s(folder_of: Callable, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", folder_of("26b"), all_of(Type.BF16))
    ids = random_ids(5)
    auto, rounded = (
        gl.load(tmp_path / "x.gguf", embed_scale=scale).run(ids, capture="layers.0.resid_pre")
        for scale in ("auto", "float32")
    )
    assert np.array_equal(auto["layers.0.resid_pre"], rounded["layers.0.resid_pre"])


WRONG_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "gemma3n"}, "general.architecture is 'gemma3n'; expected 'gemma4'"),
    ({"general.architecture": "clip"}, "mmproj"),
    ({"general.architecture": "gemma4-assistant"}, "Drafters"),
    ({"block_count": 0}, "gemma4.block_count is 0; expected an integer from 1 to 1024"),
    ({"block_count": None}, "gemma4.block_count is missing"),
    ({"block_count": 5}, "gemma4.attention.sliding_window_pattern is "),
    ({"embedding_length": 128}, "shape is "),
    ({"attention.head_count": 5}, "shape is "),
    ({"attention.head_count_kv": 3}, "head_count_kv is 3; expected divisors of the 4 heads"),
    ({"attention.head_count_kv": [1] * 8 + [2]}, "gemma4.attention.head_count_kv is "),
    ({"attention.head_count_kv": 0}, "gemma4.attention.head_count_kv is 0"),
    ({"attention.value_length": 64}, "gemma4.attention.value_length is 64; expected 128"),
    ({"rope.dimension_count_swa": 32}, "gemma4.rope.dimension_count_swa is 32; expected 64"),
    ({"attention.sliding_window_pattern": True}, "gemma4.attention.sliding_window_pattern is True"),
    ({"attention.sliding_window_pattern": [True] * 9}, "sliding_window_pattern is [True"),
    ({"attention.sliding_window": None}, "gemma4.attention.sliding_window is missing"),
    ({"attention.shared_kv_layers": 9}, "gemma4.attention.shared_kv_layers is 9"),
    ({"feed_forward_length": [256] * 8 + [300]}, "gemma4.feed_forward_length is "),
    ({"attention.layer_norm_rms_epsilon": 0.0}, "layer_norm_rms_epsilon is 0.0"),
    ({"rope.freq_base": float("nan")}, "gemma4.rope.freq_base is nan"),
    ({"rope.freq_base_swa": None}, "gemma4.rope.freq_base_swa is missing"),
    ({"final_logit_softcapping": None}, "gemma4.final_logit_softcapping is missing"),
    ({"rope.scaling.type": "yarn"}, "gemma4.rope.scaling.type is 'yarn'; expected 'none'"),
    ({"rope.scaling.factor": 8.0}, "gemma4.rope.scaling.factor is 8.0"),
    ({"hidden_activation": "silu"}, "gemma4.hidden_activation is 'silu'"),
    ({"attention.causal": False}, "gemma4.attention.causal is False; expected True"),
    ({"attn_logit_softcapping": 50.0}, "gemma4.attn_logit_softcapping is 50.0"),
    ({"attention.scale": 0.0625}, "gemma4.attention.scale is 0.0625"),
    ({"expert_count": 8}, "gemma4.expert_used_count is missing"),
    ({"expert_used_count": 2}, "gemma4.expert_used_count is 2; expected 0"),
    ({"altup.num_inputs": 4}, "the architecture key 'gemma4.altup.num_inputs' is 4"),
    ({"vocab_size": 306}, "gemma4.vocab_size is 306; expected 307"),
    ({"context_length": 0}, "gemma4.context_length is 0"),
    ({"context_length": 131072.0}, "gemma4.context_length is 131072.0"),
    ({"block_count": [9]}, "gemma4.block_count is [9]"),
    ({"tokenizer.ggml.bos_token_id": 307}, "tokenizer.ggml.bos_token_id is 307"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, "tokenizer.ggml.tokens is ['a', 'b']; expected 307"),
    ({"tokenizer.ggml.suppress_tokens": [999]}, "suppress_tokens is [999]"),
]


@pytest.mark.parametrize(("metadata", "text"), WRONG_METADATA, ids=lambda v: str(v)[:60])
def test_metadata_of_another_architecture_are_refused(
    metadata: dict[str, Any], text: str, folder_of: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, folder_of("e2b"), metadata=metadata)
    with pytest.raises(ValueError) as error:
        gl.load(path)
    assert text in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_rope_factors_decide_how_many_pairs_turn(folder_of: Callable, tmp_path: Path) -> None:
    for turning in (0, 5, 64):
        factors = np.array([1.0] * turning + [1e30] * (64 - turning), np.float32)
        path = tmp_path / f"{turning}.gguf"
        write_gguf(path, folder_of("e2b"), tensors={"rope_freqs.weight": factors})
        layers = open_checkpoint(path).config.text.layers
        assert [spec.rotary_pairs for spec in layers if spec.kind == "full"] == [turning, turning]


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"rope_freqs.weight": None}, "rope_freqs.weight is missing"),
        ({"rope_freqs.weight": np.ones(32, np.float32)}, "rope_freqs.weight is float32 [32]"),
        ({"rope_freqs.weight": np.linspace(1, 9, 64, dtype=np.float32)}, "is 1.12698 at 1"),
        ({"rope_freqs.weight": np.ones(64, np.float16)}, "rope_freqs.weight is float16"),
        ({"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight is missing; expected [256, 256]"),
        ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
        ({"token_embd.weight": np.ones(8, np.float32)}, "token_embd.weight is [8]"),
        ({"blk.0.attn_q.weight": np.ones((8, 9), np.float32)}, "shape is [8, 9]; expected [256,"),
        ({"blk.0.attn_norm.bias": np.ones(8, np.float32)}, "'blk.0.attn_norm.bias' is no tensor"),
        ({"blk.1.attn_v.weight": None}, "blk.1.attn_v.weight is missing"),
        ({"output.weight": np.ones((307, 256), np.float32)}, "expected a tied output matrix"),
        ({"blk.0.ffn_up.weight": np.ones((256, 256), np.int32)}, "type is I32; expected 'float32'"),
        ({"output_norm.weight": np.ones(256, np.int8)}, "type is I8; expected"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_tensors_of_another_model_are_refused(
    tensors: dict[str, np.ndarray | None], text: str, folder_of: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, folder_of("e2b"), tensors=tensors)
    with pytest.raises(ValueError) as error:
        gl.load(path)
    assert text in str(error.value)


def test_one_value_projection_too_many_is_refused(folder_of: Callable, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tensors = {"blk.3.attn_v.weight": np.ones((128, 256), np.float32)}
    write_gguf(path, folder_of("12b"), tensors=tensors)
    with pytest.raises(ValueError, match="blk.7.attn_v.weight is missing, but 1 other full layers"):
        gl.load(path)


def test_a_type_that_does_not_load_is_named(folder_of: Callable, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, folder_of("e2b"), all_of(Type.Q5_0))
    with pytest.raises(ValueError, match="'blk.0.attn_q.weight': type is Q5_0; expected 'float32'"):
        gl.load(path)


def test_sampling_settings_and_suppressed_tokens_come_from_the_file(
    folder_of: Callable, tmp_path: Path
) -> None:
    metadata = {
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.9,
        "tokenizer.ggml.suppress_tokens": [7, 9],
    }
    write_gguf(tmp_path / "x.gguf", folder_of("12b"), metadata=metadata)
    assert open_checkpoint(tmp_path / "x.gguf").generation_config == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "suppress_tokens": [7, 9],
    }


# Shards


def test_shards_load_from_any_of_them(folder_of: Callable, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", folder_of("31b"))
    write_gguf(tmp_path / "split.gguf", folder_of("31b"), shards=3)
    paths = sorted(tmp_path.glob("split-*.gguf"))
    assert len(paths) == 3
    ids = random_ids(9)
    expected = gl.load(tmp_path / "whole.gguf").run(ids).logits
    for path in paths:
        assert np.array_equal(gl.load(path).run(ids).logits, expected)
    paths[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(FileNotFoundError, match="split-00002-of-00003.gguf' missing beside it"):
        gl.load(paths[0])
    paths[2].rename(paths[1])
    paths[0].with_name("split-00003-of-00003.gguf").write_bytes(paths[1].read_bytes())
    with pytest.raises(ValueError, match="split.no is 2; expected 1, as the file's name says"):
        gl.load(paths[0])


# Tokenizer

HARD_TEXTS = (
    "", " ", "  ", "   a  b ", "\n", "\n\n\n", " \n \n", "a\n\n\nb\r\nc\td", "Hello, World! 27+4",
    "naïve café Ünïcödé", "日本語のテキスト", "שלום עולם", "e\u0301 \u00a0\u2003x\u200b",
    "🙂 \U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308", "\x00\x01\x7f\ufffd\ufeff",
    "▁", "a▁b ▁▁ c", "Ġthe Ġ", "<bos>", "<|turn>user\nhi<turn|>\n", "<|turn>user <turn|",
    "<0x41><0x0A>", "<|channel>thought\n<channel|>", "<unk> <pad>", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
    '<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>', "def f(x):\n    return x ** 2  # 平方\n",
    "aaaaaaaaaaaaaaaaaaaaaaaa", "1234567890" * 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def gemma_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of Gemma's pipeline (transformers' class), trained here."""
    import tokenizers
    import transformers

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>"]
    specials += ["<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]
    specials += ["<tool_response|>", '<|"|>', "<|image|>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    gemma = transformers.GemmaTokenizer()
    backend = gemma.backend_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[*specials, *bytes_], show_progress=False
    )
    text = Path(__file__).read_text() + "\n\n\n".join(HARD_TEXTS)
    backend.train_from_iterator([text[i : i + 999] for i in range(0, len(text), 999)], trainer)
    state = json.loads(backend.to_str())
    kept = set(specials)
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in kept]
    state["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False))
    settings = {f"{role}_token": f"<{role}>" for role in ("pad", "eos", "bos", "unk", "mask")}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": specials[5:]}
    settings["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "gemma"}')
    return folder


def gguf_with_tokenizer(source: Path, folder: Path, path: Path, **arguments: Any) -> Path:
    vocab = len(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"])
    tiny = make_tiny("e2b", vocab_size=vocab, **SIZES["e2b"])
    write_gguf(path, save_tiny(tiny, folder, style="released"), tokenizer=source, **arguments)
    return path


def test_token_ids_equal_those_of_the_original_tokenizer(
    gemma_tokenizer: Path, tmp_path: Path
) -> None:
    original = Tokenizer(gemma_tokenizer)
    path = gguf_with_tokenizer(gemma_tokenizer, tmp_path / "hf", tmp_path / "x.gguf")
    tokenizer = gl.load(path).tokenizer
    random = np.random.default_rng(0)
    joined = [
        "".join(random.choice(HARD_TEXTS, 8).tolist()) + chr(random.integers(1, 0xD800))
        for _ in range(300)
    ]
    for text in (*HARD_TEXTS, *joined, Path(__file__).read_text()):
        ids = original.encode(text, bos=False)
        assert tokenizer.encode(text, bos=False) == ids, text
        assert tokenizer.decode(ids) == original.decode(ids)
        assert tokenizer.decode(ids, skip_special=False) == original.decode(ids, skip_special=False)
    assert tokenizer.special_ids == original.special_ids
    assert tokenizer.vocab_size == original.vocab_size
    assert tokenizer.bos_id == 2 and tokenizer.encode("a")[0] == 2
    assert tokenizer.named_tokens == {k: v for k, v in original.named_tokens.items()}


def test_the_chat_template_comes_from_the_file(gemma_tokenizer: Path, tmp_path: Path) -> None:
    path = gguf_with_tokenizer(gemma_tokenizer, tmp_path / "hf", tmp_path / "x.gguf")
    model = gl.load(path)
    template = model.tokenizer.chat_template
    assert not template.is_default
    assert template.render([{"role": "user", "content": "hi"}]) == "<bos>hi"
    ends = [model.tokenizer.id(piece) for piece in ("<eos>", "<turn|>", "<|tool_response>")]
    assert list(model.config.eos_token_ids) == ends
    assert model.config.image_token_id == model.tokenizer.id("<|image|>")
    assert len(model.chat("Hello there", max_new_tokens=3).ids) > 0


@pytest.mark.parametrize("name", ["edge", "moe", "dense"])
def test_a_demo_model_speaks_the_same_as_gguf(name: str, tmp_path: Path) -> None:
    folder = DEMO / name
    model = gl.load(f"demo:{name}", dtype="float32", embed_scale="float32")
    write_gguf(tmp_path / "x.gguf", folder, all_of(Type.F32), tokenizer=folder)
    other = gl.load(tmp_path / "x.gguf", dtype="float32")
    for messages in ("What is 27 + 45?", "Say hello to Anna."):
        first, second = (m.chat(messages, temperature=0, max_new_tokens=24) for m in (model, other))
        assert second.prompt.ids.tolist() == first.prompt.ids.tolist()
        assert second.text == first.text


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'; expected 'gemma4'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is True; expected False"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type is an array of 2; expected"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges is 'a b c' among others"),
        ({"tokenizer.ggml.merges": [3]}, "merges is a list of other values"),
        ({"tokenizer.ggml.tokens": ["a"] * 307}, "tokens is a list with a piece twice"),
        ({"tokenizer.ggml.unknown_token_id": "x"}, "unknown_token_id is 'x'; expected a token id"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_tokenizer_that_is_not_gemmas_is_refused_when_text_needs_it(
    metadata: dict[str, Any], text: str, folder_of: Callable, tmp_path: Path
) -> None:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "ab", *(f"w{i}" for i in range(300))]
    common = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [1] * 307,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.unknown_token_id": 3,
    }
    path = tmp_path / "x.gguf"
    write_gguf(path, folder_of("e2b"), metadata={**common, **metadata})
    model = gl.load(path)  # ids need no tokenizer
    with pytest.raises(ValueError) as error:
        model.tokenizer.encode("ab")
    assert text in str(error.value)


def test_a_file_without_a_tokenizer_runs_ids(small: Path) -> None:
    model = gl.load(small)
    assert model.run([2, 5]).logits.shape == (1, 307)
    with pytest.raises(FileNotFoundError, match="has no tokenizer, but text needs one"):
        model.tokenizer.encode("hi")


# Around it


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_a_converted_file_is_the_same_model(
    dtype: str, gemma_tokenizer: Path, tmp_path: Path
) -> None:
    path = gguf_with_tokenizer(gemma_tokenizer, tmp_path / "hf", tmp_path / "x.gguf")
    packed = gl.convert(path, tmp_path / "packed", dtype)
    first, second = gl.load(path, dtype=dtype), gl.load(packed)
    ids = first.tokenizer.encode("Hello, World! 🙂\n\n")
    assert second.tokenizer.encode("Hello, World! 🙂\n\n") == ids
    assert np.array_equal(first.run(ids, logits="all").logits, second.run(ids, logits="all").logits)
    assert second.config.text == first.config.text
    assert second.config.eos_token_ids == first.config.eos_token_ids
    messages = [{"role": "user", "content": "hi"}]
    assert second.tokenizer.chat_template.render(messages) == "<bos>hi"


def test_a_file_without_a_tokenizer_converts(small: Path, tmp_path: Path) -> None:
    packed = gl.convert(small, tmp_path / "packed", "auto")
    assert np.array_equal(gl.load(packed).run([2, 5]).logits, gl.load(small).run([2, 5]).logits)


def test_inspect_and_estimate_read_a_file(small: Path) -> None:
    text = str(inspect.describe(small))
    assert "q4_0" in text and "q6_k" in text
    assert "embed_tokens.weight" in text
    estimate = sizes.estimate(small, context=64)
    stored = sum(t.nbytes for t in open_checkpoint(small).text_tensors.values())
    assert 0.8 * stored < estimate.weights < 1.3 * stored


def test_a_file_is_recognised_by_what_it_holds(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "blob-1234"
    path.write_bytes(small.read_bytes())
    assert gl.load(path).config.text.num_hidden_layers == 9
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match='does not begin with "GGUF"; expected a GGUF file'):
        gl.load(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError, match="no such file; expected a GGUF file"):
        gl.load(tmp_path / "y.gguf")


def test_version_2_and_other_alignments_load(folder_of: Callable, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, folder_of("e2b"))
    expected = gl.load(path).run([2, 5, 9]).logits
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    (tmp_path / "v2.gguf").write_bytes(data)
    assert np.array_equal(gl.load(tmp_path / "v2.gguf").run([2, 5, 9]).logits, expected)


# Hostile files: the structure, byte by byte


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def file_of(
    entries: list[bytes] = (),
    tensors: list[bytes] = (),
    *,
    data: bytes = bytes(4096),
    counts: tuple[int, int] | None = None,
) -> bytes:
    number, keys = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", 3, number, keys) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def nested(depth: int) -> bytes:
    """An array of one array of one array … of one number."""
    return struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQB", 0, 1, 7)


HUGE = (1 << 64) - 1
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", 'does not begin with "GGUF"'),
    "magic only": (b"GGUF", "the file ends within the header"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(99), "format version 1, expected 2 or 3"),
    "version 4": (b"GGUF" + struct.pack("<I", 4) + bytes(99), "format version 4, expected 2 or 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian file"),
    "tensor count": (file_of(counts=(HUGE, 0)), "tensors, expected at most 100000"),
    "key count": (file_of(counts=(0, HUGE)), "metadata keys, expected at most 65536"),
    "more keys than bytes": (struct.pack("<4sIQQ", b"GGUF", 3, 0, 60_000), "the file ends within"),
    "more tensors than bytes": (
        struct.pack("<4sIQQ", b"GGUF", 3, 90_000, 0),
        "the file ends within",
    ),
    "key length": (file_of([struct.pack("<Q", HUGE)]), "bytes, expected at most 65535"),
    "key of zeros": (file_of([entry(b"\0\0", 0, b"1")]), "other characters than printable ASCII"),
    "empty key": (file_of([entry("", 0, b"1")]), "a metadata key at byte 24 is empty"),
    "key twice": (file_of([entry("a", 0, b"1")] * 2), "the metadata key a occurs twice"),
    "unknown value type": (file_of([entry("a", 13, b"1")]), "a has the value type 13"),
    "string length": (
        file_of([entry("a", 8, struct.pack("<Q", HUGE - 7))]),
        "the file ends within a",
    ),
    "bool of 2": (file_of([entry("a", 7, b"\2")]), "a holds the byte 2, expected 0 or 1"),
    "array count": (
        file_of([entry("a", 9, struct.pack("<IQ", 10, HUGE))]),
        "a is said to have 18446744073709551615 elements",
    ),
    "array of strings count": (
        file_of([entry("a", 9, struct.pack("<IQ", 8, 1 << 40))]),
        "a is said to have",
    ),
    "array of bools": (
        file_of([entry("a", 9, struct.pack("<IQBB", 7, 2, 1, 3))]),
        "a holds the byte 3, expected 0 or 1",
    ),
    "array of unknown": (
        file_of([entry("a", 9, struct.pack("<IQ", 77, 1))]),
        "a is an array of the value type 77",
    ),
    "deep arrays": (file_of([entry("a", 9, nested(5))]), "a has arrays nested deeper than 4"),
    "very deep arrays": (
        file_of([entry("a", 9, nested(500_000))]),
        "a has arrays nested deeper than 4",
    ),
    "alignment 0": (
        file_of([entry("general.alignment", 4, struct.pack("<I", 0))]),
        "general.alignment is 0, expected a power of two",
    ),
    "alignment 24": (
        file_of([entry("general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment is 24, expected a power of two",
    ),
    "alignment as text": (
        file_of([entry("general.alignment", 8, string("32"))]),
        "general.alignment is no uint32 number",
    ),
    "name length": (file_of([], [struct.pack("<Q", 1 << 62)]), "bytes, expected at most 255"),
    "no axes": (file_of([], [tensor("t", (), 0, 0)]), "tensor t has 0 axes, expected 1 to 4"),
    "many axes": (file_of([], [tensor("t", (1,) * 9, 0, 0)]), "tensor t has 9 axes"),
    "axis of 0": (file_of([], [tensor("t", (0, 4), 0, 0)]), "the impossible shape [4, 0]"),
    "negative axis": (file_of([], [tensor("t", (HUGE,), 0, 0)]), "the impossible shape [-1]"),
    "overflowing shape": (
        file_of([], [tensor("t", (1 << 33, 1 << 33), 0, 0)]),
        "the impossible shape",
    ),
    "overflow to 0": (file_of([], [tensor("t", (1 << 32,) * 2, 0, 0)]), "the impossible shape"),
    "unknown type": (file_of([], [tensor("t", (4,), 99, 0)]), "tensor t has the unknown ggml type"),
    "part of a block": (
        file_of([], [tensor("t", (33, 2), 2, 0)]),
        "tensor t [2, 33]: rows are no whole blocks; expected a multiple of 32 for q4_0",
    ),
    "beyond the end": (file_of([], [tensor("t", (4096,), 0, 0)]), "but the file has"),
    "offset beyond": (file_of([], [tensor("t", (4,), 0, 1 << 40)]), "but the file has"),
    "offset overflows": (file_of([], [tensor("t", (4,), 0, HUGE - 31)]), "but the file has"),
    "unaligned offset": (
        file_of([], [tensor("t", (4,), 0, 4)]),
        "tensor t lies at offset 4, expected a multiple of the alignment, 32",
    ),
    "overlap": (
        file_of([], [tensor("t", (64,), 0, 0), tensor("u", (64,), 0, 128)]),
        "tensors t and u overlap in the file",
    ),
    "same place": (
        file_of([], [tensor("t", (64,), 0, 0), tensor("u", (64,), 0, 0)]),
        "overlap in the file",
    ),
    "name twice": (
        file_of([], [tensor("t", (8,), 0, 0), tensor("t", (8,), 0, 32)]),
        "tensor t occurs twice, expected it once",
    ),
    "no metadata": (file_of(), "general.architecture is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    data, text = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    with pytest.raises(ValueError) as error:
        gl.load(path)
    assert time.perf_counter() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10  # KiB
    assert text in str(error.value)
    assert str(path) in str(error.value)


def test_metadata_of_gigabytes_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    length = 3 << 30
    with path.open("wb") as file:
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry("a", 9, struct.pack("<IQ", 0, length))
        file.write(head)
        file.truncate(length + (1 << 20))
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="a is said to have 3221225472 elements"):
        gl.load(path)
    assert time.perf_counter() - begin < 1


def test_a_string_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of([entry("general.architecture", 8, string(b"\xff\xfe"))]))
    with pytest.raises(ValueError, match="general.architecture holds a string that is not UTF-8"):
        gl.load(path)


def test_every_truncation_is_refused(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    header = min(entry.begin for entry in _core.GgufFile(str(small)).tensors)
    path = tmp_path / "cut.gguf"
    random = np.random.default_rng(0)
    cuts = {*range(0, header, 7), *random.integers(header, len(data), 40).tolist(), len(data) - 32}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError) as error:
            gl.load(path)
        assert str(path) in str(error.value)


def test_no_flipped_byte_of_the_header_does_harm(small: Path, tmp_path: Path) -> None:
    """The parser accepts or refuses; what it accepts, Python refuses or reads alike."""
    data = small.read_bytes()
    header = min(entry.begin for entry in _core.GgufFile(str(small)).tensors)
    random = np.random.default_rng(1)
    path = tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        changed[random.integers(0, header)] ^= 1 << random.integers(0, 8)
        path.write_bytes(changed)
        try:
            open_checkpoint(path)
        except ValueError as error:
            assert str(path.parent) in str(error)
            refused += 1
    assert refused > 300


def test_the_header_is_read_as_it_was_written(small: Path) -> None:
    header = _core.GgufFile(str(small))
    reader = gguf.GGUFReader(small)
    assert header.version == 3 and header.alignment == 32
    assert len(header.tensors) == len(reader.tensors)
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert ours.name == theirs.name
        assert list(ours.shape) == list(reversed(theirs.shape.tolist()))
        assert (ours.begin, ours.end - ours.begin) == (theirs.data_offset, theirs.n_bytes)
    for key in header.keys:
        assert header.get(key) == reader.get_field(key).contents()
    with pytest.raises(KeyError):
        header.get("no.such.key")
    assert header.item("gemma4.attention.sliding_window_pattern", 99) is None


def test_as_llama_quantize_lays_out_what_the_benchmark_writes() -> None:
    matrix = np.zeros((4, 256), np.float32)
    assert as_llama_quantize("token_embd.weight", matrix) == Type.Q6_K
    assert as_llama_quantize("blk.0.inp_gate.weight", matrix) == Type.Q4_0
    assert as_llama_quantize("blk.0.ffn_gate_inp.weight", matrix) == Type.F32
