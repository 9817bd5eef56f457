"""The command line: its texts, what it prints where, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_session import EOS, FakeCache, FakeModel, tokenizer_folder
from gemloupe import cli
from gemloupe.generation import generate
from gemloupe.prompt import prepare


class CliModel(FakeModel):
    """A `FakeModel` with the methods that the command line calls."""

    def prepare(self, x: Any, **arguments: Any) -> Any:
        return prepare(x, self.tokenizer, self.config, **arguments)

    def generate(self, x: Any, **arguments: Any) -> Any:
        return generate(self, x, **arguments)

    def run(self, ids: list[int], cache: FakeCache, logits: None) -> None:
        cache.tokens += ids

    def new_cache(self) -> FakeCache:
        return FakeCache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))
    template = Path(cli.__file__).with_name("templates") / "gemma4.jinja"
    (folder / "chat_template.jinja").write_bytes(template.read_bytes())
    return folder


@pytest.fixture
def answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CliModel]:
    """Makes every command load a model that answers with the given scripts, row by row."""

    def use(*scripts: Any) -> CliModel:
        model = CliModel(folder, *scripts)
        monkeypatch.setattr(cli, "_load", lambda _arguments: model)
        return model

    return use


def _type(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_alone_it_shows_five_things_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert sum(line.startswith("  ") for line in text.splitlines()) == 5
    assert all(f"gemloupe {command}" in text for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert "examples:\n  " in text and f"gemloupe {command}" in text.split("examples:")[1]


def test_help_lists_only_commands_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in cli.COMMANDS)


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import gemloupe

    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"gemloupe {gemloupe.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["generat", "x"], "no command 'generat'. Did you mean 'generate'; gemloupe --help"),
        (["generate", "x", "--seed", "y"], "argument --seed: invalid int value: 'y'; gemloupe gen"),
        (["generate", "x", "--raw", "--chat"], "--chat: not allowed with argument --raw"),
        (["inspect"], "required: SOURCE; gemloupe inspect --help"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    text = capsys.readouterr().err
    assert exit.value.code == 2
    assert text.startswith("gemloupe: error: ") and text.count("\n") == 1 and expected in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["generate", "hi", "--model", "./nowhere"], "nowhere"),
        (
            ["generate", "hi", "--model", "demo:edje"],
            "expected 'demo:edge', 'demo:moe', 'demo:dense' or",
        ),
        (["inspect", "./nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gemloupe: error: ") and captured.err.count("\n") == 1
    assert expected in captured.err


def test_gemloupe_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMLOUPE_DEBUG", "1")
    with pytest.raises(OSError, match="nowhere"):
        cli.main(["inspect", "./nowhere"])


def test_generate_prints_the_answer_alone(
    answer: Callable[..., CliModel], capsys: pytest.CaptureFixture[str]
) -> None:
    model = answer("<|channel>thought\nhm<channel|>It is 4.<eos>")
    assert cli.main(["generate", "2 + 2?", "--system", "be kind", "--thinking"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("It is 4.\n", "")
    assert model.tokenizer.decode(model.requests[0].ids, skip_special=False) == (
        "<bos><|turn>system\n<|think|>\nbe kind<turn|>\n<|turn>user\n2 + 2?<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_generate_prints_the_same_streamed_or_not(
    answer: Callable[..., CliModel], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer("<|channel>thought\nhm<channel|>naïve 🙂<eos>")
    assert cli.main(["generate", "x", flag]) == 0
    assert capsys.readouterr().out == "naïve 🙂\n"


def test_raw_text_gets_no_template_and_no_warning(
    answer: Callable[..., CliModel], capsys: pytest.CaptureFixture[str]
) -> None:
    model = answer("b<eos>")
    assert cli.main(["generate", "a", "--raw"]) == 0
    assert model.tokenizer.decode(model.requests[0].ids, skip_special=False) == "<bos>a"
    assert capsys.readouterr().err == ""
    assert cli.main(["generate", "a", "--raw", "--thinking"]) == 2
    assert "leave out --raw" in capsys.readouterr().err


def test_options_reach_the_session(answer: Callable[..., CliModel]) -> None:
    model = answer("abc")
    argv = "generate x --temperature 0 --top-p 0.5 --top-k 3 --min-p 0.1 --repetition-penalty 1.2"
    cli.main([*argv.split(), "--seed", "9", "--max-new-tokens", "2", "--stop", "c", "--stop", "d"])
    request = model.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 3)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.2, 9)
    assert request.max_new_tokens == 2


def test_json_is_one_object(
    answer: Callable[..., CliModel], capsys: pytest.CaptureFixture[str]
) -> None:
    model = answer("é<eos>")
    assert cli.main(["generate", "x", "--json", "--seed", "4"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["text"], data["finish_reason"], data["seed"]) == ("é", "stop", 4)
    assert data["ids"] == [*model.tokenizer.encode("é", bos=False), EOS]
    assert data["timings"]["prefill_tokens"] == len(data["prompt_ids"])


def test_json_is_not_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "x", "--json", "--stream"]) == 2
    assert "leave out --stream" in capsys.readouterr().err


def test_the_prompt_may_come_from_a_pipe(
    answer: Callable[..., CliModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = answer("b<eos>")
    _type(monkeypatch, "piped text\n")
    assert cli.main(["generate", "--raw"]) == 0
    assert model.tokenizer.decode(model.requests[0].ids) == "piped text"


def test_ctrl_c_ends_with_130_and_no_traceback(
    answer: Callable[..., CliModel], capsys: pytest.CaptureFixture[str]
) -> None:
    answer([7, KeyboardInterrupt()])
    assert cli.main(["generate", "x"]) == 130
    assert capsys.readouterr().err == "\n"


def test_a_chat_keeps_its_history_and_reads_only_what_is_new(
    answer: Callable[..., CliModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = answer("Hello.<eos>")
    cache = FakeCache()
    monkeypatch.setattr(CliModel, "new_cache", lambda _self: cache)
    _type(monkeypatch, "hi\nand now?\n")
    assert cli.main(["chat", "--system", "be kind"]) == 0
    assert capsys.readouterr().out == "Hello.\nHello.\n"
    read = model.tokenizer.decode(cache.tokens, skip_special=False)
    assert read == (
        "<bos><|turn>system\nbe kind<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\nHello.<turn|>\n"
        "<|turn>user\nand now?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>Hello."
    )
    assert len(model.requests[0].ids) == 1  # What the second reply's session still had to read.


def test_chat_commands(
    answer: Callable[..., CliModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = answer("ok<eos>")
    _type(monkeypatch, "one\n/reset\n/system be kind\n\ntwo\n/rest\n/help\n/exit\nthree\n")
    assert cli.main(["chat"]) == 0
    out = capsys.readouterr().out
    assert "The conversation is forgotten.\nNew instructions, new conversation.\nok\n" in out
    assert "No command /rest. Did you mean '/reset'" in out and "? /help lists them.\n" in out
    assert "/system TEXT" in out
    text = model.tokenizer.decode(model.requests[0].cache.tokens, skip_special=False)
    assert "be kind" in text and "two" in text and "one" not in text and "three" not in text


def test_ctrl_c_stops_the_reply_and_the_chat_goes_on(
    answer: Callable[..., CliModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = answer()
    letters = model.tokenizer.encode("ab", bos=False)
    model.scripts = [[*letters, KeyboardInterrupt()]]
    _type(monkeypatch, "one\ntwo\n")
    assert cli.main(["chat"]) == 0
    assert capsys.readouterr().out == "ab\n(stopped)\nab\n(stopped)\n"


def test_an_error_in_a_chat_is_a_line_and_the_chat_goes_on(
    answer: Callable[..., CliModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer("ok<eos>")
    _type(monkeypatch, "one\n/system x\ntwo\n")
    assert cli.main(["chat", "--temperature", "-1"]) == 0
    out = capsys.readouterr().out
    assert out.count("gemloupe: error: temperature is -1") == 2


def test_a_closed_pipe_is_no_error_text() -> None:
    command = f"{sys.executable} -m gemloupe generate --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=_environment())
    assert done.stdout.startswith("usage: gemloupe generate") and done.stderr == ""


def _environment() -> dict[str, str]:
    paths = [path for path in sys.path if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_generate_on_a_real_checkpoint(tiny: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_models import save_tiny_tokenizer

    _, folder = tiny("e2b", text_only=True)
    save_tiny_tokenizer(folder)
    argv = ["generate", "the cat", "--raw", "--model", str(folder), "--json", "--seed", "1"]
    outputs = []
    for _ in range(2):
        assert cli.main([*argv, "--max-new-tokens", "6"]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0]["ids"] == outputs[1]["ids"] and 1 <= len(outputs[0]["ids"]) <= 6


def test_a_json_schema_and_a_thinking_budget_hold_in_generate_and_chat(
    answer: Callable[..., CliModel],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    schema = tmp_path / "colour.schema.json"
    schema.write_text('{"enum": ["red", "blue"]}')
    wish = '<|channel>thought\nabcd\n<channel|>"blue"<eos>'
    options = ["--thinking", "--max-thinking-tokens", "9", "--json-schema", str(schema)]
    answer(wish)
    assert cli.main(["generate", "A colour?", *options, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["text"], shown["reasoning"]) == ('"blue"', "abcd")
    answer(wish)
    _type(monkeypatch, "A colour?\n")
    assert cli.main(["chat", *options]) == 0
    assert capsys.readouterr().out == '"blue"\n'
    answer(wish)
    options[2] = "2"
    assert cli.main(["generate", "A colour?", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasoning"] == "ab"
    schema.write_text("[]")
    assert cli.main(["generate", "A colour?", *options]) == 2
    assert str(schema) in capsys.readouterr().err
