"""JSONL batches: every line answered once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import gemloupe as gl
from gemloupe import cli


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.load("demo:edge", threads=1)


def _write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _sums(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"sum-{n}", "messages": [{"role": "user", "content": f"What is {n} + {2 * n}?"}]}
        for n in range(count)
    ]


GREEDY = {"temperature": 0, "max_tokens": 24}


def test_plain_lines_give_what_generate_gives(model: gl.Model, tmp_path: Path) -> None:
    source = _write(
        tmp_path / "in.jsonl",
        *_sums(3),
        {"prompt": "The sun rises", "max_new_tokens": 4},
        {"prompt": [2, 100, 101], "seed": 5, "temperature": 1.0},
    )
    result = gl.run_batch(model, source, tmp_path / "out.jsonl", defaults=GREEDY, in_order=True)
    records = _records(tmp_path / "out.jsonl")
    assert (result.done, result.failed, result.skipped) == (5, 0, 0)
    for record, line in zip(records, _sums(3), strict=False):
        expected = model.generate(line["messages"], temperature=0, max_new_tokens=24)
        assert (record["id"], record["text"]) == (line["id"], expected.text)
        assert record["usage"]["completion_tokens"] == len(expected.ids)
    raw = model.generate("The sun rises", temperature=0, max_new_tokens=4)
    assert records[3]["text"] == raw.text and records[3]["finish_reason"] == raw.finish_reason
    drawn = model.generate([2, 100, 101], temperature=1.0, seed=5, max_new_tokens=24)
    assert records[4]["text"] == drawn.text and records[4]["id"] is None


def test_lines_of_openais_batches_give_its_responses(model: gl.Model, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is 27 + 45?"}]
    body = {"model": "gpt", "messages": messages, "n": 2, "logprobs": True, "top_logprobs": 2}
    text = {"model": "gpt", "prompt": "The sun", "max_tokens": 3, "echo": True, "logprobs": 1}
    source = _write(
        tmp_path / "in.jsonl",
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "text", "url": "/v1/completions", "body": text},
    )
    gl.run_batch(model, source, tmp_path / "out.jsonl", defaults=GREEDY, in_order=True)
    chat, completion = _records(tmp_path / "out.jsonl")
    assert chat["custom_id"] == "chat" and chat["error"] is None
    assert chat["response"]["status_code"] == 200
    answer = chat["response"]["body"]
    assert answer["object"] == "chat.completion" and answer["model"] == "gpt"
    expected = model.generate(messages, temperature=0, max_new_tokens=24)
    assert [c["message"]["content"] for c in answer["choices"]] == [expected.text] * 2
    assert len(answer["choices"][0]["logprobs"]["content"]) == len(expected.ids)
    echoed = completion["response"]["body"]["choices"][0]
    assert echoed["text"].startswith("The sun")
    assert "".join(echoed["logprobs"]["tokens"]) == echoed["text"]


def test_a_bad_line_becomes_an_error_record_and_the_rest_goes_on(
    model: gl.Model, tmp_path: Path
) -> None:
    source = _write(
        tmp_path / "in.jsonl",
        "{not json",
        {"id": 1, "prompt": "a", "messages": []},
        {"id": 2, "messages": [{"role": "wizard", "content": "Hi"}]},
        {"id": 3, "prompt": "a", "temperatur": 1},
        {"id": 4, "prompt": "a", "stream": True},
        {"id": 5, "prompt": "a", "n": 2},
        {"id": 6, "prompt": "a", "capture": ["layers.3.attn.zz"]},
        {"id": 6, "prompt": "a"},
        {"custom_id": "x", "url": "/v1/embeddings", "body": {"input": "a"}},
        {"custom_id": "y", "body": {"messages": [{"role": "user", "content": "a" * 999_999}]}},
        "",
        {"id": 7, "prompt": "The sun"},
    )
    result = gl.run_batch(model, source, tmp_path / "out.jsonl", defaults=GREEDY, in_order=True)
    records = _records(tmp_path / "out.jsonl")
    assert (result.done, result.failed) == (11, 10)
    messages = [r["error"]["message"] for r in records[:8]]
    for message, part in zip(
        messages,
        (
            "line 1: the body is not JSON", 'expected one of "prompt" and "messages"',
            "messages[0].role is 'wizard'", "unknown field 'temperatur'", "stream is true",
            "a plain line has one answer", "no hook point", "line 8 has the id 6 of line 7",
        ),
        strict=True,
    ):  # fmt: skip
        assert part in message
    assert records[8]["response"]["status_code"] == 400
    assert "url is '/v1/embeddings'" in records[8]["response"]["body"]["error"]["message"]
    assert "tokens; expected at most" in records[9]["response"]["body"]["error"]["message"]
    assert records[10]["text"] and [r["input"]["line"] for r in records] == [*range(1, 11), 12]


def test_files_of_other_systems_are_read(model: gl.Model, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [b'\xef\xbb\xbf{"id": 1, "prompt": "a"}', b"", b'{"id": 2, "prompt": "b"}']
    source.write_bytes(b"\r\n".join(lines))
    result = gl.run_batch(model, source, tmp_path / "out.jsonl", defaults=GREEDY, in_order=True)
    assert [(r["id"], r["input"]["line"]) for r in _records(tmp_path / "out.jsonl")] == [
        (1, 1),
        (2, 3),
    ]
    assert (result.done, result.failed) == (2, 0)


def test_captures_go_to_files_or_into_records(model: gl.Model, tmp_path: Path) -> None:
    lines = [{"prompt": "The sun rises in the"}, {"prompt": "What is", "n": 1}]
    source = _write(tmp_path / "in.jsonl", *lines)
    defaults = {**GREEDY, "capture": ["layers.3.resid_post"]}
    folder = tmp_path / "arrays"
    arguments: dict[str, Any] = {"defaults": defaults, "in_order": True}
    gl.run_batch(model, source, tmp_path / "out.jsonl", captures=folder, **arguments)
    for record, line in zip(_records(tmp_path / "out.jsonl"), lines, strict=True):
        arrays = load_file(folder / record["captures"])
        expected = model.generate(
            line["prompt"], temperature=0, max_new_tokens=24, capture="layers.3.resid_post"
        )
        captured = expected.captured["layers.3.resid_post"]
        np.testing.assert_array_equal(arrays["layers.3.resid_post"], captured)
        ids = np.concatenate([expected.prompt.ids, expected.ids])
        np.testing.assert_array_equal(arrays["ids"], ids)
        assert "captured" not in record["gemloupe"]
    gl.run_batch(model, source, tmp_path / "inline.jsonl", **arguments)
    inline = _records(tmp_path / "inline.jsonl")[0]["gemloupe"]["captured"]
    assert inline["layers.3.resid_post"]["dtype"] == "float32"


def test_what_was_killed_goes_on_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", *_sums(60))
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "gemloupe", "batch", str(source), str(out),
        "--temperature", "0", "--max-new-tokens", "48", "--threads", "1", "--max-rows", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (out.is_file() and out.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = out.read_bytes().count(b"\n")
    assert 5 <= before < 60
    with out.open("ab") as file:  # As if the crash had cut a record.
        file.write(b'{"id": "sum-59", "text": "on')
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{60 - before} done (0 of them errors), {before} were done before" in again.stderr
    records = _records(out)
    assert sorted(r["id"] for r in records) == sorted(line["id"] for line in _sums(60))
    model = gl.load("demo:edge", threads=1)
    for record in records[before - 2 : before + 3]:
        line = next(line for line in _sums(60) if line["id"] == record["id"])
        expected = model.generate(line["messages"], temperature=0, max_new_tokens=48)
        assert record["text"] == expected.text


def test_ctrl_c_ends_cleanly(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", *_sums(400))
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "gemloupe", "batch", str(source), str(out), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (out.is_file() and out.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    assert 2 <= len(_records(out)) < 400 and out.read_bytes().endswith(b"\n")


def test_an_output_of_other_settings_is_refused(model: gl.Model, tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", *_sums(1))
    out = tmp_path / "out.jsonl"
    gl.run_batch(model, source, out, defaults=GREEDY)
    content = out.read_bytes()
    with pytest.raises(ValueError, match="was made with defaults .*'max_tokens': 24.* this is"):
        gl.run_batch(model, source, out, defaults={**GREEDY, "max_tokens": 23})
    with pytest.raises(ValueError, match="was made with dtype 'bfloat16', and this is 'int4'"):
        gl.run_batch(gl.load("demo:edge", "int4", threads=1), source, out, defaults=GREEDY)
    with pytest.raises(ValueError, match="was made with fingerprint another"):
        gl.run_batch(gl.load("demo:dense", threads=1), source, out, defaults=GREEDY)
    assert out.read_bytes() == content
    other = gl.run_batch(model, source, out, defaults={"max_tokens": 3}, restart=True)
    assert other.done == 1 and _records(out)[0]["usage"]["completion_tokens"] == 3


def test_lines_may_be_added_but_not_changed(model: gl.Model, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    gl.run_batch(model, _write(source, *_sums(2)), out, defaults=GREEDY)
    result = gl.run_batch(model, _write(source, *_sums(3)), out, defaults=GREEDY)
    assert (result.done, result.skipped) == (1, 2)
    _write(source, {"id": "sum-0", "prompt": "another"}, *_sums(3)[1:])
    with pytest.raises(ValueError, match="line 1 is another one than when its record was written"):
        gl.run_batch(model, source, out, defaults=GREEDY)


def test_what_is_no_batch_is_not_overwritten(model: gl.Model, tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", *_sums(1))
    precious = tmp_path / "precious.txt"
    precious.write_text("mine\n")
    with pytest.raises(ValueError, match="without precious.txt.batch.json: no batch"):
        gl.run_batch(model, source, precious)
    with pytest.raises(ValueError, match="is both input and output"):
        gl.run_batch(model, source, source, restart=True)
    with pytest.raises(FileNotFoundError):
        gl.run_batch(model, tmp_path / "none.jsonl", tmp_path / "new.jsonl")
    assert precious.read_text() == "mine\n" and not (tmp_path / "new.jsonl").exists()
    out = tmp_path / "out.jsonl"
    gl.run_batch(model, source, out, defaults=GREEDY)
    out.write_text('{"text": "by hand"}\n')
    with pytest.raises(ValueError, match="line 1 is no record of a batch"):
        gl.run_batch(model, source, out, defaults=GREEDY)


def test_a_folder_is_no_output(model: gl.Model, tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", *_sums(1))
    with pytest.raises(IsADirectoryError, match="is a folder; expected a file for the answers"):
        gl.run_batch(model, source, tmp_path)


def test_one_process_at_a_time_writes_an_output(model: gl.Model, tmp_path: Path) -> None:
    import fcntl

    source = _write(tmp_path / "in.jsonl", *_sums(1))
    with (tmp_path / "out.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing this batch"):
            gl.run_batch(model, source, tmp_path / "out.jsonl")


def test_wrong_defaults_are_said_before_anything_is_written(
    model: gl.Model, tmp_path: Path
) -> None:
    source = _write(tmp_path / "in.jsonl", *_sums(1))
    for defaults, message in (
        ({"temperature": -1}, "defaults: temperature is -1"),
        ({"stop": 3}, "defaults: stop is 3"),
        ({"messages": []}, "defaults has 'messages', which each line says itself"),
    ):
        with pytest.raises(ValueError, match=message):
            gl.run_batch(model, source, tmp_path / "out.jsonl", defaults=defaults)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_default_seed_counts_up_with_the_lines(model: gl.Model, tmp_path: Path) -> None:
    lines = [{"prompt": "The"}] * 3
    source = _write(tmp_path / "in.jsonl", *lines)
    defaults = {"seed": 10, "temperature": 1.0, "max_tokens": 6}
    gl.run_batch(model, source, tmp_path / "out.jsonl", defaults=defaults, in_order=True)
    seeds = [record["gemloupe"]["seed"] for record in _records(tmp_path / "out.jsonl")]
    assert seeds == [11, 12, 13]


def test_the_command_line_says_how_many_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _write(tmp_path / "in.jsonl", {"prompt": "The sun"}, {"prompt": 3})
    out = str(tmp_path / "out.jsonl")
    arguments = ["--threads", "1", "--max-new-tokens", "4", "--temperature", "0", "--thinking"]
    assert cli.main(["batch", str(source), out, *arguments]) == 1
    assert "2 done (1 of them errors), 0 were done before" in capsys.readouterr().err
