"""Builds the demo models' tokenizer: BPE with byte fallback and Gemma 4's special tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from corpus import CAPITALS, SYSTEMS, Sample, stream
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEMPLATE = Path(__file__).parents[2] / "python/gemloupe/templates/gemma4.jinja"

# Gemma 4's special tokens; a token's place here is its id.
SPECIAL = (
    "<pad> <eos> <bos> <unk> <mask> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> "
    '<tool_response|> <|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <image|> '
    "<|audio> <audio|> <|image|> <|audio|> <|video|>"
).split()
ID = {piece: i for i, piece in enumerate(SPECIAL)}

# Attributes under which transformers' Gemma 4 processor looks for the media and turn pieces.
NAMED = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "think_token": "<|think|>",
}

# What the template writes around a tool; string delimiters are special tokens, here newlines.
TOOL_WORDS = (
    "thought\ndeclaration:calculator{description:\n,parameters:{properties:"
    "{expression:{type:\nSTRING\n}},required:[\n],type:\nOBJECT\n}}"
)


def chat_template(empty_thought: bool) -> str:
    """The package's template; E2B and E4B (and so `edge`) prefill no empty thought."""
    default = "empty_thought | default(true)"
    text = TEMPLATE.read_text()
    assert default in text
    return text if empty_thought else text.replace(default, "empty_thought | default(false)")


def plain_text(sample: Sample) -> str:
    """The sample's words with the special tokens cut out, for learning the merges."""
    texts = [str(message["content"]) for message in sample.messages] + sample.parts
    text = "\n".join(texts)
    for piece in SPECIAL:
        text = text.replace(piece, "\n")
    return text


def build(vocab_size: int, seed: int = 0, samples: int = 20000) -> Tokenizer:
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    # Digits and newlines stand alone; a word takes its leading space along, and no mark.
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\n|▁?[^\W\d]+|▁?[^\w\s▁]+"), "isolated")
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
    fixed = SPECIAL + byte_pieces

    printable = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(fixed),
        initial_alphabet=printable,
        min_frequency=2,
        show_progress=False,
    )
    texts = [plain_text(s) for s in itertools.islice(stream(seed), samples)]
    texts += list(SYSTEMS) * 50 + [TOOL_WORDS] * 1000
    texts += [f" {name}" for pair in CAPITALS.items() for name in pair] * 300  # one token each
    tok.train_from_iterator(texts, trainer)
    learned = json.loads(tok.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {piece: i for i, piece in enumerate(fixed + pieces)}
    tok.model = models.BPE(
        vocab=vocab,
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tok.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIAL])
    return tok


def wrap(tok: Tokenizer, empty_thought: bool) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(empty_thought),
        extra_special_tokens=NAMED,
    )


def save(tok: Tokenizer, folder: Path, empty_thought: bool) -> None:
    """Writes tokenizer.json (compact), tokenizer_config.json and chat_template.jinja."""
    wrap(tok, empty_thought).save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":"))
    )
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
