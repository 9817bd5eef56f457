"""Perplexity and KL divergence of texts: against transformers, and against their own definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemloupe as gl
from gemloupe import cli
from tiny_models import save_tiny_tokenizer

TEXT = "the hen in the hat, and then the man: 12 + 30 = 42! in the end, a hat in a hen. " * 2
BOS = 2


@pytest.fixture(scope="module")
def pair(tiny: Any) -> tuple[Any, gl.Model, list[int]]:
    """A model of transformers, the same in gemloupe, and a text's ids."""
    reference, folder = tiny("e2b")
    save_tiny_tokenizer(folder)
    model = gl.load(folder, "float32", threads=1)
    return reference, model, model.tokenizer.encode(TEXT, bos=False)


def _logits(reference: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(input_ids=torch.tensor([ids])).logits[0].double()


def _strided(reference: Any, ids: list[int], window: int, stride: int) -> list[float]:
    """Log-probabilities by the loop of transformers' guide, BOS before every window."""
    found, done = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window - 1, len(ids))
        read = [BOS, *ids[begin:end]]
        logprobs = _logits(reference, read)[:-1].log_softmax(-1)
        chosen = logprobs[range(len(read) - 1), read[1:]]
        found += chosen[-(end - done) :].tolist()
        done = end
        if end == len(ids):
            break
    return found


@pytest.mark.parametrize(("window", "stride"), [(32, None), (40, 7), (2048, None)])
def test_strided_perplexity_is_that_of_transformers(
    pair: Any, window: int, stride: int | None
) -> None:
    reference, model, ids = pair
    result = gl.perplexity(model, TEXT, window=window, stride=stride)
    expected = _strided(reference, ids, window, stride or window // 2)
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
    assert result.tokens == len(ids)
    assert result.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)
    bits = -sum(expected) / math.log(2) / len(TEXT.encode())
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-4)
    error = np.std(expected, ddof=1) / math.sqrt(len(ids)) * result.perplexity
    assert result.standard_error == pytest.approx(error, rel=1e-3)


def test_the_rule_of_llama_cpp_scores_the_second_half_of_disjoint_windows(pair: Any) -> None:
    reference, model, ids = pair
    every, window = [BOS, *ids], 24
    expected: list[float] = []
    for chunk in range(len(every) // window):
        read = [BOS, *every[chunk * window + 1 : (chunk + 1) * window]]
        logprobs = _logits(reference, read).log_softmax(-1)
        expected += [float(logprobs[i, read[i + 1]]) for i in range(window // 2, window - 1)]
    result = gl.perplexity(model, TEXT, window=window, rule="llama.cpp")
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
    assert result.bits_per_byte is None and result.stride is None


def test_divergence_is_that_of_transformers(tiny: Any, pair: Any) -> None:
    reference, model, ids = pair
    other, folder = tiny("e2b", seed=1)
    save_tiny_tokenizer(folder)
    result = gl.kl(gl.load(folder, "float32", threads=1), model, TEXT, window=1000)
    read = [BOS, *ids]
    log_p = _logits(reference, read)[:-1].log_softmax(-1)
    log_q = _logits(other, read)[:-1].log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    np.testing.assert_allclose(result.kl, expected, atol=1e-4)
    assert result.mean == pytest.approx(expected.mean(), abs=1e-4)
    assert result.percentile(99) == pytest.approx(np.percentile(expected, 99), abs=1e-3)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(same))
    delta = (log_q.exp() - log_p.exp())[range(len(ids)), ids].numpy()
    np.testing.assert_allclose(result.delta_p, delta, atol=1e-5)
    assert result.reference.perplexity == pytest.approx(
        gl.perplexity(model, TEXT, window=1000).perplexity, rel=1e-6
    )


def test_a_model_does_not_diverge_from_itself(pair: Any) -> None:
    _, model, _ = pair
    result = gl.kl(model, model, TEXT, window=50)
    assert result.mean == result.percentile(100) == 0
    assert result.top1_agreement == 1 and result.log_ratio == 0


def test_logits_are_read_in_blocks_that_change_nothing(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemloupe import scoring

    _, model, _ = pair
    whole = gl.kl(model, model, TEXT).model
    held = []
    run = model.run

    def watched(*arguments: Any, **named: Any) -> Any:
        made = run(*arguments, **named)
        held.append(0 if made.logits is None else made.logits.shape[0])
        return made

    monkeypatch.setattr(model, "run", watched)
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 5 * 4 * model.config.text.vocab_size)
    cut = gl.kl(model, model, TEXT).model
    np.testing.assert_allclose(cut.logprobs, whole.logprobs, atol=1e-5)
    assert max(held) == 5
    held.clear()
    np.testing.assert_allclose(gl.perplexity(model, TEXT).logprobs, whole.logprobs, atol=1e-5)
    assert max(held) == 0


def test_ids_and_first_tokens_can_be_given(pair: Any) -> None:
    _, model, ids = pair
    result = gl.perplexity(model, TEXT, max_tokens=20)
    of_ids = gl.perplexity(model, ids[:20])
    np.testing.assert_array_equal(result.logprobs, of_ids.logprobs)
    text = model.tokenizer.decode(ids[:20])
    assert result.bits_per_byte == of_ids.bits_per_byte
    assert result.bits_per_byte == gl.perplexity(model, text).bits_per_byte


def test_wrong_arguments_say_what_is_expected(pair: Any) -> None:
    _, model, _ = pair
    for arguments, message in (
        ({"window": 1}, "window is 1; expected 2 to 262144 tokens"),
        ({"window": 10, "stride": 10}, r"stride is 10; expected 1 to 9 \(window − 1\)"),
        ({"rule": "hf"}, "rule is 'hf'; expected 'strided' or 'llama.cpp'"),
        ({"rule": "llama.cpp", "stride": 4}, "stride goes with"),
        ({"rule": "llama.cpp", "window": 4096}, "expected at least 4095 for windows of 4096"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gl.perplexity(model, TEXT, **arguments)
    with pytest.raises(ValueError, match="the text has 0 tokens; expected at least 1"):
        gl.perplexity(model, "")
    with pytest.raises(ValueError, match="the reference has another tokenizer"):
        gl.kl(model, gl.load("demo:edge", threads=1), TEXT)


def test_the_command_line_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The sun rises in the east. " * 20)
    assert cli.main(["perplexity", str(path), "--threads", "1", "--window", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "perplexity", "bits per byte", "tokens", "speed",
    ]  # fmt: skip
    arguments = ["--reference", "demo:edge", "--dtype", "int4", "--json", "--window", "64"]
    assert cli.main(["perplexity", str(path), "--threads", "1", *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl_mean"] > 0 and figures["kl_percentiles"]["99"] >= figures["kl_mean"]
    assert figures["reference"]["perplexity"] != figures["model"]["perplexity"]
    path.write_bytes(b"\xff\xfe text")
    assert cli.main(["perplexity", str(path)]) == 2
    assert "is no UTF-8 text: byte 0 belongs to none" in capsys.readouterr().err
