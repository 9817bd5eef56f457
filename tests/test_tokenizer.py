"""Text to ids and back; streaming decodes what a single decode gives."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from gemloupe.config import ModelConfig, parse_config
from gemloupe.tokenizer import StreamDecoder, Tokenizer
from snapshot_texts import assert_is_snapshot
from tiny_models import save_tiny_tokenizer

VOCAB_SIZE = 480
BOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def _config(**values: object) -> ModelConfig:
    return parse_config({"model_type": "gemma4_text", **values})


def test_text_begins_with_exactly_one_bos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    assert ids[0] == BOS and BOS not in ids[1:]
    assert tokenizer.encode("<bos>the cat") == ids
    assert tokenizer.encode("<bos><bos>the cat", bos=True) == ids
    assert tokenizer.encode("the cat", bos=False) == ids[1:]


def test_a_tokenizer_that_adds_bos_itself_gives_the_same_ids(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, sequence],
        "pair": [bos, sequence],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    adding = Tokenizer(tmp_path, _config(bos_token_id=BOS))
    assert adding.encode("the cat") == tokenizer.encode("the cat")


def test_encode_and_decode_agree_with_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the cat sat.\n", "naïve €5 🙂", "  two  spaces", "<|turn>user\nhi<turn|>"):
        ids = tokenizer.encode(text, bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)


def test_ids_of_config_win_over_names_of_tokenizer_config(folder: Path) -> None:
    tokenizer = Tokenizer(folder, _config(bos_token_id=7, eos_token_id=[1, 52]))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (7, (1, 52))
    assert (Tokenizer(folder).bos_id, Tokenizer(folder).eos_ids) == (BOS, (1,))


def test_bos_true_without_any_bos_is_a_value_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)
    with pytest.raises(ValueError, match="names a BOS token; pass bos=False or add"):
        tokenizer.encode("a", bos=True)


def test_nothing_is_loaded_before_text_needs_it(folder: Path) -> None:
    tokenizer = Tokenizer(folder, _config(bos_token_id=BOS, eos_token_id=1))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.loaded) == (BOS, (1,), False)
    assert tokenizer.encode("a") and tokenizer.loaded


def test_a_missing_file_is_an_error_only_when_text_needs_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        tokenizer.encode("a")
    assert_is_snapshot("prompt", "missing tokenizer", str(caught.value), folder=tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        Tokenizer(tmp_path).decode([1])


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"', "\x00\x01"])
def test_a_corrupt_file_is_a_value_error_naming_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer .*download it again"):
        Tokenizer(tmp_path).encode("a")


def test_wrong_arguments_say_what_was_expected(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="must be a str, got bytes"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="\"auto\", True or False, got 'always'"):
        tokenizer.encode("a", bos="always")
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_ids_without_a_piece_are_shown_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.tokens([BOS, VOCAB_SIZE + 5]) == ["<bos>", f"<id {VOCAB_SIZE + 5}>"]
    assert tokenizer.decode([VOCAB_SIZE + 5]) == ""


def _stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("skip_special", [True, False])
def test_streamed_pieces_join_to_the_decode_of_all_ids(
    tokenizer: Tokenizer, skip_special: bool
) -> None:
    generator = random.Random(0)
    bytes_only = [tokenizer.id(f"<0x{byte:02X}>") for byte in (0xE2, 0x82, 0xAC, 0xF0, 0x41)]
    for _ in range(300):
        ids = [
            generator.choice(bytes_only) if generator.random() < 0.5
            else generator.randrange(VOCAB_SIZE)
            for _ in range(generator.randrange(1, 24))
        ]  # fmt: skip
        pieces = _stream(tokenizer, ids, skip_special)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special), ids


def test_what_was_streamed_is_never_changed_by_later_ids(tokenizer: Tokenizer) -> None:
    text = "naïve €5 🙂🙂 the end"
    ids = tokenizer.encode(text, bos=False)
    decoder = StreamDecoder(tokenizer)
    shown = ""
    for token in ids:
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown + decoder.flush() == text


def test_a_broken_character_at_the_end_is_released_by_flush(tokenizer: Tokenizer) -> None:
    first_byte = tokenizer.id("<0xE2>")
    assert first_byte is not None
    assert _stream(tokenizer, [first_byte], True) == ["", "\ufffd"]


def test_byte_level_vocabularies_hold_back_cut_characters(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a€🙂", bos=False)
    assert _stream(tokenizer, ids, True) == ["a", "", "", "€", "", "", "", "🙂", ""]
