"""gemloupe as a model of lm-evaluation-harness, against the harness's own `hf` model."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import gemloupe as gl
from gemloupe import cli
from gemloupe.integrations import lm_eval as integration
from gemloupe.integrations.lm_eval import GemloupeLM
from tiny_models import save_tiny_tokenizer

FEW_SHOT = "q: the in an the\na: then\n\nq: in the hat\na: hen\n\n"
PAIRS = [
    (FEW_SHOT + "q: a man\na:", " the man"),
    (FEW_SHOT + "q: a man\na:", " hat"),
    (FEW_SHOT + "q: a man\na:", " x"),
    (FEW_SHOT + "q: a hen in\na: ", "then"),
    ("in the", " end"),
    ("", "the hen"),
    ("the hen in the", "\n"),
]
TEXTS = ["the hen in the hat, and then the man: 12 + 30 = 42!", "a", "in the end " * 12]


@pytest.fixture(scope="module")
def pair(tiny: Any) -> tuple[HFLM, gl.Model]:
    """The harness's model and gemloupe's, of one checkpoint in float32."""
    reference, folder = tiny("e2b")
    save_tiny_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    # Begins every text with BOS, as Gemma's tokenizers do.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    theirs = HFLM(pretrained=reference, tokenizer=tokenizer, device="cpu", batch_size=3)
    return theirs, gl.load(folder, "float32", threads=1)


def _requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def _ours(model: gl.Model, **arguments: Any) -> GemloupeLM:
    return GemloupeLM(model, **arguments)


def test_loglikelihoods_are_those_of_the_harness_with_transformers(pair: Any) -> None:
    theirs, model = pair
    requests = _requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    got = _ours(model).loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([g[0] for g in got], [e[0] for e in expected], atol=1e-4)
    assert [g[1] for g in got] == [e[1] for e in expected]


def test_a_greedy_continuation_is_said_to_be_one(pair: Any) -> None:
    theirs, model = pair
    prompt = model.tokenizer.encode(FEW_SHOT)
    best = model.generate(prompt, max_new_tokens=3, temperature=0).ids.tolist()
    asked = [((None, prompt, best)), (None, prompt, [*best[:2], best[2] ^ 1])]
    assert [g[1] for g in _ours(model)._loglikelihood_tokens(asked)] == [True, False]
    assert [e[1] for e in theirs._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False]


def test_what_contexts_share_is_read_once(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair
    head = list(range(60, 100))
    contexts = [[2, *head, 101, 102], [2, *head, 103], [2, *head[:20], 104], [2, 105, 106]]
    read = []
    run = model.run
    monkeypatch.setattr(
        model, "run", lambda ids, **given: read.append(len(ids)) or run(ids, **given)
    )
    shared = _ours(model)._loglikelihood_tokens([(None, each, [107]) for each in contexts])
    # The first 21 and the next 20 ids once, then what is left of each context.
    assert sorted(read) == sorted([21, 20, 2, 1, 1, 3])
    for context, score in zip(contexts, shared, strict=True):
        alone = _ours(model)._loglikelihood_tokens([(None, context, [107])])[0]
        np.testing.assert_allclose(score[0], alone[0], atol=1e-4)


def test_rolling_loglikelihoods_are_those_of_the_harness(pair: Any) -> None:
    theirs, model = pair
    requests = _requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    # Its rule puts a BOS before texts that have one already: give it texts without.
    processor = theirs.tokenizer.backend_tokenizer.post_processor
    theirs.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    try:
        for length in (None, 13):
            theirs._max_length = length or 256
            expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
            ours = _ours(model, max_length=length, window_bos=False)
            got = ours.loglikelihood_rolling(requests, disable_tqdm=True)
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-4)
    finally:
        theirs.tokenizer.backend_tokenizer.post_processor = processor
        theirs._max_length = None


def test_every_rolling_window_begins_with_one_bos_and_predicts_each_token_once(pair: Any) -> None:
    _, model = pair
    ids = model.tokenizer.encode(TEXTS[2], bos=False)
    windows = list(_ours(model, max_length=13)._windows(TEXTS[2]))
    assert [token for _, predicted in windows for token in predicted] == ids
    for context, predicted in windows:
        inputs = [*context, *predicted[:-1]]
        assert inputs[0] == 2 and 2 not in inputs[1:] and len(inputs) <= 13
    assert len(windows[-1][0]) + len(windows[-1][1]) == 14  # The last has a full context.


def test_generated_texts_are_those_of_the_harness(pair: Any) -> None:
    theirs, model = pair
    given = {"max_gen_toks": 12, "do_sample": False}
    contexts = [FEW_SHOT, "in the", "the hen in the hat", "a man: ", FEW_SHOT + "q: a"]
    plain = _requests("generate_until", [(each, {**given, "until": []}) for each in contexts])
    expected = theirs.generate_until(plain, disable_tqdm=True)
    assert _ours(model).generate_until(plain, disable_tqdm=True) == expected
    # Stop at something that comes in the middle of the first answer.
    stop = next(text[4:6] for text in expected if len(text) > 7)
    stopped = _requests("generate_until", [(each, {**given, "until": [stop]}) for each in contexts])
    expected = theirs.generate_until(stopped, disable_tqdm=True)
    assert _ours(model).generate_until(stopped, disable_tqdm=True) == expected
    assert not any(stop in text for text in expected)


def test_bos_begins_each_input_once_and_stays_when_the_left_is_cut(pair: Any) -> None:
    _, model = pair
    lm = _ours(model, max_length=20)
    assert lm.tok_encode("the hen")[:2] != [2, 2] and lm.tok_encode("the hen")[0] == 2
    assert lm.tok_encode("<bos>the hen") == lm.tok_encode("the hen")
    assert 2 not in lm.tok_encode("the hen", add_special_tokens=False)
    context, continuation = lm._encode_pair("the hen in", " the hat")
    assert context[0] == 2 and 2 not in continuation
    cut = lm._fitted([2, *range(60, 100)], [101, 102])
    assert cut[0] == 2 and cut[1:] == list(range(82, 100)) and len(cut) + 1 <= 20
    with pytest.raises(ValueError, match="21 tokens; expected at most 20"):
        lm._fitted([2], list(range(60, 81)))


def test_chats_are_rendered_by_the_checkpoints_template() -> None:
    lm = _ours(gl.load("demo:edge", threads=1))
    chat = [{"role": "user", "content": "What is 27 + 45?"}]
    text = lm.apply_chat_template(chat)
    assert lm.tok_encode(text) == lm.model.prepare(chat).ids.tolist()
    begun = [*chat, {"role": "assistant", "content": "It is "}]
    opened = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert opened == text + "It is"
    assert lm.chat_template(True) == lm.model.tokenizer.chat_template.templates["default"]
    with pytest.raises(ValueError, match="no chat template 'other'; expected 'default'"):
        lm.chat_template("other")


def test_arguments_that_nothing_knows_are_refused(pair: Any) -> None:
    _, model = pair
    with pytest.raises(ValueError, match="model_args has 'revison'; expected pretrained"):
        GemloupeLM("demo:edge", revison="main")
    request = _requests("generate_until", [("the", {"until": [], "num_beams": 4})])
    with pytest.raises(ValueError, match="generation_kwargs has 'num_beams'"):
        _ours(model).generate_until(request, disable_tqdm=True)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task and one whose answers are generated."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": "What is 10 + 11?", "right": "ones 0+1=1", "wrong": "ones 0+1=2"},
        {"question": "What is 27 + 28?", "right": "ones 7+8=15", "wrong": "ones 7+8=14"},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files: {folder / 'data.jsonl'}\n"
        "test_split: train\ndoc_to_text: '{{question}}'\ntarget_delimiter: ''\n"
    )
    (folder / "sums_choice.yaml").write_text(
        f"task: sums_choice\noutput_type: multiple_choice\n{common}"
        "doc_to_choice: '{{[wrong, right]}}'\ndoc_to_target: 1\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "sums_text.yaml").write_text(
        f"task: sums_text\noutput_type: generate_until\n{common}doc_to_target: '{{{{right}}}}'\n"
        'generation_kwargs:\n  until: ["\\n", " carry"]\n  max_gen_toks: 16\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder


def test_the_command_line_evaluates_a_task_with_chats(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # Reading the harness's thousands of own tasks takes half a minute.
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    code = cli.main([
        "eval", "--model_args", "pretrained=demo:edge,dtype=int4,threads=1",
        "--tasks", "sums_choice,sums_text", "--include_path", str(tasks),
        "--apply_chat_template", "--output_path", str(tmp_path / "out.json"),
    ])  # fmt: skip
    assert code == 0
    results = json.loads(next(tmp_path.glob("out_*.json")).read_text())
    assert results["config"]["model"] == "gemloupe"
    assert results["config"]["model_dtype"] == "int4"
    assert results["results"]["sums_choice"]["acc,none"] == 1.0
    assert results["results"]["sums_text"]["exact_match,none"] == 1.0


def test_without_the_harness_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "gemloupe.integrations.lm_eval")
    monkeypatch.delattr("gemloupe.integrations.lm_eval")
    assert cli.main(["eval", "--tasks", "arc_easy"]) == 2
    assert 'pip install "gemloupe[eval]"' in capsys.readouterr().err


def test_the_module_registers_the_model_by_name() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("gemloupe") is integration.GemloupeLM
