"""gl.help: its pages, how topics are found, and that the code in them runs and is true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import docs_blocks
import gemloupe as gl
from adapter_files import write_adapter
from gemloupe import _core, help_pages
from gguf_files import write_gguf
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer

# Written as a page's own code does: its name, and what it needs in the working folder.
GGUF = "model-Q4_0.gguf"
ADAPTER = "my-adapter"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_gguf(tmp_path / GGUF, docs_blocks.DEMO, tokenizer=docs_blocks.DEMO)
    seeing = make_tiny("26b", towers="tiny", media_ids=True, vision={"position_embedding_size": 64})
    save_tiny_tokenizer(save_tiny(seeing, tmp_path / "gemma-4-26B-A4B-it"))
    hearing = make_tiny("e2b", towers="audio", media_ids=True)
    save_tiny_tokenizer(save_tiny(hearing, tmp_path / "gemma-4-E2B-it"))
    write_adapter(tmp_path / ADAPTER, docs_blocks.DEMO)
    write_adapter(
        tmp_path / "seeing-adapter",
        tmp_path / "gemma-4-26B-A4B-it",
        end=("layers.0.self_attn.q_proj", "q_proj.linear", "embedding_projection"),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("page", help_pages.PAGES)
@pytest.mark.filterwarnings("ignore:a str is raw text")
def test_the_code_of_every_page_runs(page: str, place: Path) -> None:
    assert docs_blocks.blocks(page, "python")
    docs_blocks.execute(page, "python")


@pytest.mark.filterwarnings("ignore:a str is raw text")
def test_both_sides_of_the_page_on_transformers_give_the_same() -> None:
    theirs = docs_blocks.execute("from_transformers", "python theirs", folder=docs_blocks.DEMO)
    ours = docs_blocks.execute("from_transformers", "python")
    pairs = [(theirs[name], ours[name]) for name in ("logits", "steered")]
    pairs += [(value[0], array) for value, array in both(theirs, ours, "hidden_states")]
    pairs += [(value[0], array) for value, array in both(theirs, ours, "attentions")]
    pairs += [(theirs["seen"]["out"], ours["seen"])]
    pairs += [(theirs["keys"].transpose(0, 1), ours["keys"])]
    for value, array in pairs:
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        np.testing.assert_allclose(array, value, atol=1e-4 * max(1, np.abs(value).max()))
    assert ours["text"] == theirs["text"]


def both(theirs: dict, ours: dict, name: str) -> list:
    return list(zip(theirs[name], ours[name], strict=True))


def test_every_hook_point_has_one_sentence_and_no_other_has() -> None:
    names = {row[0] for row in _core.hook_points() if not row[0].endswith(".scale")}
    assert set(help_pages.hook_meanings()) == names


def test_the_page_on_hooks_shows_the_engines_table() -> None:
    page = help_pages.text("hooks")
    assert "<!--" not in page
    for row in _core.hook_points():
        name = f"layers.{{i}}.{row[0]}" if row[1] else row[0]
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert row[2] in line and row[4] in line and row[5] in line


def test_names_in_backticks_on_the_pages_are_hook_points(place: Path) -> None:
    """Names of tables and prose, where they begin with "layers." or "blocks."."""
    for page in help_pages.PAGES:
        text = help_pages.text(page)
        for name in re.findall(r"`((?:layers|blocks)\.\d+\.[\w.]+)`", text):
            assert "no help" not in help_pages.text(name), f"{page}: {name}"


def test_without_a_topic_the_pages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    gl.help()
    shown = capsys.readouterr().out
    for page in help_pages.PAGES:
        assert f'gl.help("{page}")' in shown and help_pages.title(page) in shown


@pytest.mark.parametrize(
    ("topic", "page"),
    [
        ("hooks", "hooks"),
        ("Hook points", "hooks"),
        ("hoks", "hooks"),
        ("When numbers differ", "numbers"),
        ("number", "numbers"),
        ("from TransformerLens", "from_transformer_lens"),
        ("llama.cpp", "from_llama_cpp"),
        ("from-nnsight", "from_nnsight"),
        ("semantic", "semantics"),
        ("error", "errors"),
        ("chats", "chat"),
    ],
)
def test_topics_are_found_in_any_spelling_near_them(topic: str, page: str) -> None:
    assert help_pages.text(topic).startswith(f"# {help_pages.title(page)}\n")


def test_a_hook_points_name_shows_its_row() -> None:
    for topic in ("layers.3.attn.z", "attn.z", "blocks.12.attn.hook_z"):
        shown = help_pages.text(topic)
        assert shown.startswith("layers.{i}.attn.z  [T, N, H]")
        assert "input of o_proj" in shown and "self_attn.o_proj.input" in shown
    assert "divisor of the norm attn.norm" in help_pages.text("layers.0.attn.norm.scale")
    assert help_pages.text("model.language_model.layers.2.mlp.down_proj").startswith(
        "layers.{i}.mlp.out"
    )


def test_an_unknown_topic_names_the_pages_near_it() -> None:
    with pytest.raises(KeyError, match="from_transformer_lens.*from_transformers"):
        help_pages.text("transformer")
    with pytest.raises(KeyError, match="Pages are 'hooks'"):
        help_pages.text("weather")
    with pytest.raises(KeyError, match="Pages are 'hooks'"):
        help_pages.text("")
    with pytest.raises(TypeError, match="expected a text"):
        help_pages.text(3)  # type: ignore[arg-type]


def test_pages_begin_with_a_title_and_have_no_unclosed_code() -> None:
    for page in help_pages.PAGES:
        text = help_pages.text(page)
        assert re.match(r"# \S", text) and text.count("```") % 2 == 0
        assert text.isprintable() or "\n" in text
