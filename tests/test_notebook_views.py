"""How a run and a model show themselves in a notebook: HTML in the page's own colours."""

from __future__ import annotations

import dataclasses
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import gemloupe as gl
from adapter_files import write_adapter


class _Page(HTMLParser):
    """Reads cells, and checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.load("demo:edge")


def _has_no_colours_of_its_own(html: str) -> bool:
    """Text takes the page's colour, the background shows through; the lines are half-clear grey."""
    colours = {match.strip() for match in re.findall(r"(?:color|background):([^;\"]+)", html)}
    return colours == {"inherit", "transparent"} and not re.search(r"(?<!&)#", html)


def test_a_run_shows_what_it_captured_as_html(model: gl.Model) -> None:
    run = model.run([2, 300, 301], capture=["layers.3.resid_post", "layers.0.attn.pattern"])
    html = run._repr_html_()
    cells = _Page(html).cells
    assert dict(zip(cells[::2], cells[1::2], strict=True)) == {
        "tokens": "3",
        "logits": "[1, 1024]",
        "layers.0.attn.pattern": "[4, 3, 3]",
        "layers.3.resid_post": "[3, 96]",
    }
    assert _has_no_colours_of_its_own(html)


def test_a_run_of_many_captures_says_how_many_there_are(model: gl.Model) -> None:
    run = model.run([2, 300], capture="layers.*.mlp.*", logits=None)
    cells = _Page(run._repr_html_()).cells
    assert len(cells) == 2 * (1 + 12 + 1) and cells[-1] == f"{len(run.captured)} captured in all"


def test_a_model_shows_what_it_is_as_html(model: gl.Model) -> None:
    html = model._repr_html_()
    cells = _Page(html).cells
    facts = dict(zip(cells[::2], cells[1::2], strict=True))
    assert facts["layers"] == "10 of 96: 8 sliding (window 32), 2 full"
    assert facts["keys and values"] == "5 layers read those of layers 3, 4"
    assert facts["per-layer input"] == "32 a layer"
    assert facts["vocabulary"] == "1,024" and facts["weights"] == "bfloat16"
    assert "experts" not in facts and "demo:edge" in html
    assert _has_no_colours_of_its_own(html)


def test_experts_and_values_that_are_keys_are_named() -> None:
    cells = _Page(gl.load("demo:moe")._repr_html_()).cells
    facts = dict(zip(cells[::2], cells[1::2], strict=True))
    assert facts["experts"] == "2 of 16 a token"
    assert facts["keys and values"] == "values are keys in 2 layers"


def test_names_from_files_are_escaped(model: gl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    named = dataclasses.replace(model.checkpoint, source="<script>x</script>")
    monkeypatch.setattr(model, "checkpoint", named)
    html = model._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_results_travel_between_processes():
    model = gl.load("demo:moe")
    ids = model.tokenizer.encode("two plus three")
    run = model.run(ids, capture="layers.0.resid_post", keep=True)
    copy = pickle.loads(pickle.dumps(run))
    np.testing.assert_array_equal(copy["layers.0.resid_post"], run["layers.0.resid_post"])
    np.testing.assert_array_equal(copy.logits, run.logits)
    assert copy.routing.tokens(0, 1) == run.routing.tokens(0, 1)
    assert (copy.cache, copy.model, copy.kept) == (None, None, None)
    out = model.generate(ids, max_new_tokens=4, temperature=0)
    copy = pickle.loads(pickle.dumps(out))
    assert (copy.text, copy.ids.tolist()) == (out.text, out.ids.tolist())
    assert copy.prompt.tokens == out.prompt.tokens


def test_results_travel_without_adapters_and_tools_functions(tmp_path: Path) -> None:
    def add(a: int, b: int) -> int:  # Local: it can't be pickled.
        """Adds two numbers."""
        return a + b

    model = gl.load("demo:moe")
    model.load_adapter(write_adapter(tmp_path / "a", model.checkpoint.folder), name="a")
    run = model.run([2, 70, 80], adapter="a", capture="layers.0.resid_post")
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(run))))
    assert copy.adapters.label == "a" and not copy.adapters.adapters
    assert repr(copy) == repr(run)
    out = model.chat("two plus three", tools=[add], max_new_tokens=4, temperature=0)
    copy = pickle.loads(pickle.dumps(out))
    assert copy.prompt.tools[0].schema == out.prompt.tools[0].schema
    assert (copy.text, copy.prompt.tools[0].function) == (out.text, None)
    assert out.prompt.tools[0].function is add
