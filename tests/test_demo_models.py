"""The shipped demo checkpoints: size, layout, tokens, template and what they learned."""

from __future__ import annotations

import itertools
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gemloupe.checkpoint import DEMO_NAMES

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "python/gemloupe/demo"
NAMES = ("edge", "moe", "dense")
ALL = (*NAMES, "media")
sys.path.insert(0, str(ROOT / "scripts/demo_models"))

SPECIAL = (
    "<pad> <eos> <bos> <unk> <mask> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> "
    '<tool_response|> <|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <image|> '
    "<|audio> <audio|> <|image|> <|audio|> <|video|>"
).split()


def config_of(name: str) -> dict[str, Any]:
    return json.loads((DEMO / name / "config.json").read_text())


def header_of(name: str) -> dict[str, Any]:
    with open(DEMO / name / "model.safetensors", "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    header.pop("__metadata__", None)
    return header


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    folder = DEMO / request.param
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return request.param, tok, model.eval()


@pytest.fixture(scope="module")
def edge_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DEMO / "edge")


@pytest.fixture(scope="module")
def dense_tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(DEMO / "dense")


def test_all_four_fit_in_ten_megabytes() -> None:
    assert ALL == DEMO_NAMES
    files = [f for name in ALL for f in (DEMO / name).iterdir()]
    assert sum(f.stat().st_size for f in files) <= 10_000_000


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bfloat16_under_the_released_names(name: str) -> None:
    header = header_of(name)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert all(key.startswith("model.language_model.") for key in header)
    assert config_of(name)["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert config_of(name)["vision_config"] is None and config_of(name)["audio_config"] is None


@pytest.mark.parametrize("name", NAMES)
def test_widths_are_multiples_of_32_and_the_vocabulary_is_small(name: str) -> None:
    text = config_of(name)["text_config"]
    assert text["vocab_size"] <= 2048
    assert all(
        size % 32 == 0 for entry in header_of(name).values() for size in entry["shape"] if size > 16
    )


def test_each_demo_has_the_parts_of_its_big_sibling() -> None:
    edge, moe, dense = (config_of(name)["text_config"] for name in NAMES)
    assert (
        edge["num_kv_shared_layers"]
        and edge["use_double_wide_mlp"]
        and edge["hidden_size_per_layer_input"]
    )
    assert moe["enable_moe_block"] and moe["attention_k_eq_v"]
    assert (
        dense["attention_k_eq_v"]
        and not dense["enable_moe_block"]
        and not dense["num_kv_shared_layers"]
    )
    assert not any(
        ".v_proj" in k and f"layers.{len(dense['layer_types']) - 1}." in k
        for k in header_of("dense")
    )


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_have_the_ids_that_the_config_names(name: str) -> None:
    config, tok = config_of(name), transformers.AutoTokenizer.from_pretrained(DEMO / name)
    ids = {piece: tok.convert_tokens_to_ids(piece) for piece in SPECIAL}
    assert sorted(ids.values()) == list(range(len(SPECIAL)))
    assert (
        config["image_token_id"] == ids["<|image|>"] and config["boi_token_id"] == ids["<|image>"]
    )
    assert (
        config["audio_token_id"] == ids["<|audio|>"]
        and config["video_token_id"] == ids["<|video|>"]
    )
    generation = json.loads((DEMO / name / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]]
    assert (generation["do_sample"], generation["top_k"], generation["top_p"]) == (True, 64, 0.95)


def test_all_share_one_tokenizer() -> None:
    assert len({(DEMO / name / "tokenizer.json").read_bytes() for name in ALL}) == 1


@pytest.mark.parametrize(
    "text",
    ["27 + 45", "Héllo wörld 漢字 🙂", " two  spaces\n\nand\tmore ", "def f(x):\r\n    return x_1"],
)
def test_tokenizer_gives_any_text_back(edge_tokenizer: Any, text: str) -> None:
    ids = edge_tokenizer.encode(text, add_special_tokens=False)
    assert edge_tokenizer.decode(ids) == text


def test_digits_are_single_tokens(edge_tokenizer: Any) -> None:
    assert edge_tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"s": "a", "n": 3}}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "w",
        "description": "Get",
        "parameters": {
            "type": "object",
            "properties": {"loc": {"type": "string", "description": "City", "enum": ["a"]}},
            "required": ["loc"],
        },
    },
}
MEDIA = {
    "role": "user",
    "content": [
        {"type": "image"},
        {"type": "text", "text": " what? "},
        {"type": "audio"},
        {"type": "video"},
    ],
}


def test_template_prefills_an_empty_thought_except_on_edge(
    edge_tokenizer: Any, dense_tokenizer: Any
) -> None:
    def render(tok: Any) -> str:
        return tok.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)

    start = "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"
    assert render(edge_tokenizer) == start
    assert render(dense_tokenizer) == start + "<|channel>thought\n<channel|>"


TEMPLATE_CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "thinking": (
        [USER],
        {"enable_thinking": True},
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n",
    ),
    "system text and thinking": (
        [{"role": "system", "content": " Be brief. "}, USER],
        {"enable_thinking": True},
        "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n",
    ),
    "media parts": (
        [MEDIA],
        {},
        "<bos><|turn>user\n<|image|>what?<|audio|><|video|><turn|>\n<|turn>model\n",
    ),
    "tool declaration": (
        [USER],
        {"tools": [WEATHER]},
        '<bos><|turn>system\n<|tool>declaration:w{description:<|"|>Get<|"|>,parameters:{properties:{loc:{description:'
        '<|"|>City<|"|>,enum:[<|"|>a<|"|>],type:<|"|>STRING<|"|>}},required:[<|"|>loc<|"|>],type:<|"|>OBJECT<|"|>}}'
        "<tool|><turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n",
    ),
    "call and result stay in one open model turn": (
        [
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "name": "f", "content": "ok"},
        ],
        {},
        '<bos><|turn>user\nhi<turn|>\n<|turn>model\n<|tool_call>call:f{n:3,s:<|"|>a<|"|>}<tool_call|>'
        '<|tool_response>response:f{value:<|"|>ok<|"|>}<tool_response|>',
    ),
    "result with thinking opens a thought": (
        [
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "name": "f", "content": {"x": [1, None]}},
        ],
        {"enable_thinking": True},
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n<|tool_call>call:f{n:3,s:"
        '<|"|>a<|"|>}<tool_call|><|tool_response>response:f{x:[1,null]}<tool_response|><|channel>thought\n',
    ),
    "answer after a result closes the turn": (
        [
            USER,
            {"role": "assistant", "tool_calls": [CALL | {"id": "1"}]},
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
            {"role": "assistant", "content": "done"},
            USER,
        ],
        {},
        '<bos><|turn>user\nhi<turn|>\n<|turn>model\n<|tool_call>call:f{n:3,s:<|"|>a<|"|>}<tool_call|>'
        '<|tool_response>response:f{value:<|"|>ok<|"|>}<tool_response|>done<turn|>\n<|turn>user\nhi<turn|>\n'
        "<|turn>model\n",
    ),
    "old thoughts leave the history": (
        [USER, {"role": "assistant", "content": "<|channel>thought\nx\n<channel|> yes "}, USER],
        {},
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\nyes<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n",
    ),
    "stored reasoning of the running turn is kept": (
        [
            USER,
            {"role": "assistant", "reasoning": "x", "tool_calls": [CALL]},
            {"role": "tool", "name": "f", "content": 7},
        ],
        {},
        "<bos><|turn>user\nhi<turn|>\n<|turn>model\n<|channel>thought\nx\n<channel|><|tool_call>call:f{n:3,s:"
        '<|"|>a<|"|>}<tool_call|><|tool_response>response:f{value:7}<tool_response|>',
    ),
}


@pytest.mark.parametrize("case", TEMPLATE_CASES)
def test_template_renders(edge_tokenizer: Any, case: str) -> None:
    messages, options, expected = TEMPLATE_CASES[case]
    rendered = edge_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **options
    )
    assert rendered == expected


def test_checkpoint_sums_numbers_it_never_saw(checkpoint: tuple[str, Any, Any]) -> None:
    import corpus

    name, tok, model = checkpoint
    samples = list(itertools.islice(corpus.stream(3, held_out=True, task="sum_2_digits"), 20))
    prompts = [
        tok.apply_chat_template(
            s.messages, enable_thinking=True, add_generation_prompt=True, tokenize=False
        )
        for s in samples
    ]
    inputs = tok(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=60,
        )
    replies = tok.batch_decode(out[:, inputs["input_ids"].shape[1] :])
    right = [s.parts[0] in reply for reply, s in zip(replies, samples, strict=True)]
    assert sum(right) >= 18, f"{name}: {replies}"
