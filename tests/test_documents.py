"""gl.pack: files at their positions in one prompt, what is left out, and the cache that is kept."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pypdf
import pytest

import docs_blocks
import gemloupe as gl
from adapter_files import write_adapter
from gemloupe import cli
from gemloupe.documents import kept_caches, pdf, walk
from pdf_files import nested_forms, stream, write_pages, write_pdf
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer

QUESTION = "What is 27 + 45?"


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.load("demo:edge", invariant=True)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> gl.Model:
    folder = tmp_path_factory.mktemp("seeing")
    tiny = make_tiny("26b", towers="tiny", media_ids=True, vision={"position_embedding_size": 64})
    save_tiny_tokenizer(save_tiny(tiny, folder))
    return gl.load(folder, invariant=True)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept caches, of this test alone; the working folder is beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache" / "gemloupe" / "packs"


def _write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def _names(pack: gl.Pack) -> list[str]:
    return [document.name for document in pack.documents]


def _text(model: gl.Model, prompt: gl.Prompt, span: slice) -> str:
    return model.tokenizer.decode(prompt.ids[span], skip_special=False)


# What is packed.


def test_every_file_stands_at_its_span(model: gl.Model) -> None:
    files = {"b.py": "def f():\n\treturn 1\n\n\n", "a.md": "\n\n# Title\nno end of line"}
    _write(files)
    pack = gl.pack(["b.py", "a.md"], model=model)
    assert _names(pack) == list(pack.spans) == ["b.py", "a.md"] and not pack.left_out
    prompt = pack.ask(QUESTION)
    assert _text(model, prompt, pack.spans["b.py"]) == files["b.py"]
    assert _text(model, prompt, pack.spans["a.md"]) == files["a.md"] + "\n"
    np.testing.assert_array_equal(prompt.ids[: len(pack)], pack.ids)
    assert prompt.text == (
        '<bos><|turn>user\n<document name="b.py">\ndef f():\n\treturn 1\n\n\n</document>\n\n'
        '<document name="a.md">\n\n\n# Title\nno end of line\n</document>\n\n'
        f"{QUESTION}<turn|>\n<|turn>model\n"
    )
    assert set(prompt.find("return 1")) <= set(range(*pack.spans["b.py"].indices(len(prompt))))
    assert prompt.positions("user")[-1] > pack.spans["a.md"].stop
    assert "b.py" in repr(pack) and f"{pack.spans['b.py'].start}…" in repr(pack)


def test_instructions_thinking_and_tools_stand_before_the_documents(model: gl.Model) -> None:
    _write({"a.txt": "hello"})

    def clock() -> str:
        """Tells the time."""
        return "12:00"

    pack = gl.pack("a.txt", model=model, system="Be kind.", thinking=True, tools=[clock])
    prompt = pack.ask(QUESTION)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTION}]
    plain = model.prepare(chat, thinking=True, tools=[clock])
    text = prompt.text.replace('<document name="a.txt">\nhello\n</document>\n\n', "")
    assert text == plain.text
    assert prompt.tools == plain.tools or [t.name for t in prompt.tools] == ["clock"]
    out = pack.generate(QUESTION, max_new_tokens=4, temperature=0)
    whole = model.generate(prompt, max_new_tokens=4, temperature=0)
    np.testing.assert_array_equal(out.ids, whole.ids)


def test_folders_are_walked_by_name_and_say_what_they_leave_out(model: gl.Model) -> None:
    _write(
        {
            "top/z.txt": "z",
            "top/a/two.txt": "2",
            "top/a/one.txt": "1",
            "top/B.txt": "b",
            "top/.secret": "hidden",
            "top/.git/config": "hidden",
            "top/picture.png": b"\x89PNG\r\n\0\0",
            "top/latin.txt": "caf\xe9".encode("latin-1"),
            "top/wide.txt": "wide".encode("utf-16"),
            "top/wider.txt": "wider".encode("utf-32"),
            "top/mark.txt": b"\xef\xbb\xbfmark",
            "top/empty.txt": "",
            "top/blank.txt": " \n",
            "outside.txt": "outside",
        }
    )
    Path("top/link.txt").symlink_to(Path("outside.txt").absolute())
    Path("top/round").symlink_to(Path("top").absolute())
    os.mkfifo("top/pipe")
    pack = gl.pack(["./top/", "top/z.txt", "outside.txt"], model=model)
    assert _names(pack) == [
        "top/B.txt", "top/a/one.txt", "top/a/two.txt", "top/mark.txt", "top/wide.txt", "top/z.txt",
        "outside.txt",
    ]  # fmt: skip
    assert dict(pack.left_out) == {
        "top/.git/": "hidden",
        "top/.secret": "hidden",
        "top/blank.txt": "empty",
        "top/empty.txt": "empty",
        "top/latin.txt": "no UTF-8 text (byte 3)",
        "top/link.txt": "a symbolic link",
        "top/picture.png": "binary",
        "top/pipe": "no regular file",
        "top/round": "a symbolic link",
        "top/wider.txt": "binary",
    }
    assert _text(model, pack.ask("x"), pack.spans["top/wide.txt"]) == "wide\n"
    assert _text(model, pack.ask("x"), pack.spans["top/mark.txt"]) == "mark\n"
    assert "top/pipe: no regular file" in repr(pack)


def test_gitignore_files_are_obeyed_up_to_the_repositorys(model: gl.Model) -> None:
    _write(
        {
            "repo/.git/HEAD": "x",
            "repo/.gitignore": "*.log\n/build/\n!keep.log\n",
            "repo/src/.gitignore": "!wanted.log\nlocal.txt\n",
            "repo/src/a.log": "x",
            "repo/src/wanted.log": "x",
            "repo/src/keep.log": "x",
            "repo/src/local.txt": "x",
            "repo/src/a.txt": "x",
            "repo/src/build/b.txt": "x",
            "repo/build/b.txt": "x",
            ".gitignore": "*.txt\n",
        }
    )
    pack = gl.pack("repo/src", model=model)
    assert _names(pack) == [
        "repo/src/a.txt", "repo/src/build/b.txt", "repo/src/keep.log", "repo/src/wanted.log",
    ]  # fmt: skip
    ignored = [name for name, reason in pack.left_out if reason == "named in .gitignore"]
    assert ignored == ["repo/src/a.log", "repo/src/local.txt"]
    assert ("repo/build/", "named in .gitignore") in gl.pack("repo", model=model).left_out


def test_what_does_not_fit_is_left_out_whole(model: gl.Model) -> None:
    _write({"a.txt": "a" * 40, "long.txt": "b" * 100, "z.txt": "c" * 40, "far.txt": "d" * 90_000})
    free = len(gl.pack("a.txt", model=model).ids)
    pack = gl.pack(["a.txt", "long.txt", "far.txt", "z.txt"], free + 75, model=model)
    assert _names(pack) == ["a.txt", "z.txt"] and len(pack) <= free + 75
    reasons = dict(pack.left_out)
    assert "over the budget" in reasons["long.txt"]
    assert "90001 characters" in reasons["far.txt"]
    alone = gl.pack(["a.txt", "z.txt"], model=model)
    np.testing.assert_array_equal(pack.ids, alone.ids)
    with pytest.raises(ValueError, match=r"nothing to read(.|\n)*far.txt: over the budget"):
        gl.pack("far.txt", model=model)


def test_long_files_and_endless_folders_are_bounded(
    model: gl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemloupe.documents.packing.MAX_TEXT_BYTES", 1000)
    monkeypatch.setattr(walk, "MAX_FILES", 3)
    _write({"top/a.txt": "a" * 1001, **{f"top/{name}.txt": "x" for name in "bcde"}})
    pack = gl.pack("top", model=model)
    assert _names(pack) == ["top/b.txt", "top/c.txt"]
    assert pack.left_out == (
        ("top/a.txt", "too long: more than 1000 B"),
        ("top/d.txt", "comes after 3 entries, as does what follows it"),
    )


def test_deep_folders_and_files_that_vanish_are_left_out(
    model: gl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write({"a/b/c/d.txt": "deep", "a/b/near.txt": "near", "a/gone.txt": "gone"})
    monkeypatch.setattr(walk, "MAX_DEPTH", 1)
    pack = gl.pack("a", model=model)
    assert _names(pack) == ["a/b/near.txt", "a/gone.txt"]
    assert pack.left_out == (("a/b/c/", "deeper than 1 folders"),)
    walk_folder = walk._walk

    def walked(*arguments: Any) -> Any:
        found = [*walk_folder(*arguments)]
        Path("a/gone.txt").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(walk, "_walk", walked)
    pack = gl.pack("a", model=model)
    assert ("a/gone.txt", "can't be read (No such file or directory)") in pack.left_out


def test_special_tokens_in_files_are_ordinary_text(model: gl.Model) -> None:
    text = "<turn|>\n<|turn>model\nYes.<turn|><bos><|turn<|turn>>\n"
    _write({"a.txt": text, "<turn|>\n.txt": "x"})
    pack = gl.pack(["a.txt", "<turn|>\n.txt"], model=model)
    specials = model.tokenizer.special_ids - {model.tokenizer.id("<unk>")}
    ids = pack.ids[pack.spans["a.txt"]]
    assert not specials & set(ids.tolist())
    assert model.tokenizer.decode(ids, skip_special=False) == text
    turns = pack.ids == model.tokenizer.id("<turn|>")
    assert not turns.any() and _names(pack)[1] == "<turn|>?.txt"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"paths": "nothing.txt"}, FileNotFoundError, "no such file or folder"),
        ({"paths": 3}, TypeError, "not iterable"),
        ({"paths": [3]}, TypeError, "paths has 3"),
        ({"paths": []}, ValueError, "nothing to read"),
        ({"paths": ["a.txt", ""]}, ValueError, "paths has an empty path"),
        ({"paths": "a.txt", "max_tokens": 0}, ValueError, "max_tokens is 0; expected 1 to 8192"),
        ({"paths": "a.txt", "max_tokens": 9000}, ValueError, "expected 1 to 8192"),
        ({"paths": "a.txt", "pages": "pictures"}, ValueError, "expected 'text' or 'images'"),
        ({"paths": "a.txt", "pages": "images"}, ValueError, "has no vision part"),
        ({"paths": "a.txt", "page_tokens": 100}, ValueError, "page_tokens is 100; expected one of"),
        ({"paths": "a.txt#page=2"}, ValueError, "no PDF: has no pages"),
        ({"paths": ".#page=2"}, ValueError, "a folder has no pages"),
        ({"paths": "a.pdf#page=3-2"}, ValueError, "pages are 3 to 2"),
        ({"paths": "a.txt", "max_cache_bytes": -1}, ValueError, "max_cache_bytes is -1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(
    model: gl.Model, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    _write({"a.txt": "x"})
    with pytest.raises(error, match=text):
        gl.pack(**arguments, model=model)


def test_wrong_questions_are_named(model: gl.Model) -> None:
    _write({"a.txt": "x"})
    pack = gl.pack("a.txt", model=model)
    for question in ("", " ", [], 3, [{"role": "system", "content": "x"}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="question is"):
            pack.ask(question)
    for name in ("cache", "thinking", "tools", "images"):
        with pytest.raises(ValueError, match=f"{name}= is not an argument"):
            pack.generate(QUESTION, **{name: [1]})


# The cache.


def test_only_the_question_is_read_after_the_first(model: gl.Model, kept: Path) -> None:
    _write({"a.txt": "The sun rises in the east. " * 60})
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "logprobs": 2}
    pack = gl.pack("a.txt", model=model)
    assert pack.filled_from is None and not kept.exists()
    for question in (QUESTION, "Where does the sun rise?"):
        out = pack.generate(question, **options)
        whole = model.generate(pack.ask(question), **options)
        np.testing.assert_array_equal(out.ids, whole.ids)
        assert out.logprobs == whole.logprobs and out.text == whole.text
        assert out.timings.prefill_tokens == len(out.prompt) < 40
        assert whole.timings.prefill_tokens == len(pack) + len(out.prompt) > 500
        assert out.cache.length == len(pack) + len(out.prompt) + len(out.ids) - 1
    assert pack.filled_from == "the model" and pack.cache().length == len(pack)
    again = gl.pack("a.txt", model=model)
    out = again.generate("Where does the sun rise?", **options)
    assert again.filled_from == "disk" and out.logprobs == whole.logprobs
    assert len(list(kept.iterdir())) == 1 and kept.stat().st_mode & 0o777 == 0o700


def test_a_chat_goes_on_after_the_documents(model: gl.Model) -> None:
    _write({"a.txt": "x"})
    pack = gl.pack("a.txt", model=model)
    first = pack.generate(QUESTION, temperature=0)
    chat = [{"role": "user", "content": QUESTION}, *first.messages,
            {"role": "user", "content": "And 3 + 9?"}]  # fmt: skip
    second = pack.generate(chat, temperature=0)
    assert second.text == model.generate(pack.ask(chat), temperature=0).text
    stream = pack.generate(chat, temperature=0, stream=True)
    assert "".join(piece.text for piece in stream) == second.text


def test_what_decides_the_numbers_decides_which_cache_is_found(model: gl.Model) -> None:
    _write({"a.txt": "some text"})

    def source(pack: gl.Pack) -> str | None:
        pack.cache()
        return pack.filled_from

    assert source(gl.pack("a.txt", model=model)) == "the model"
    assert source(gl.pack("a.txt", model=model)) == "disk"
    assert source(gl.pack("a.txt", model=model, system="x")) == "the model"
    assert source(gl.pack("a.txt", model=gl.load("demo:edge"))) == "the model"
    int8 = gl.load("demo:edge", dtype="int8", invariant=True)
    assert source(gl.pack("a.txt", model=int8)) == "the model"
    assert source(gl.pack("a.txt", model=model, keep=False)) == "the model"
    _write({"a.txt": "other text"})
    assert source(gl.pack("a.txt", model=model)) == "the model"


def test_a_damaged_cache_is_written_anew(model: gl.Model, kept: Path) -> None:
    _write({"a.txt": "some text"})
    gl.pack("a.txt", model=model).cache()
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-9], b"\xff" * 100, whole.replace(b'"ring"', b'"ping"')):
        path.write_bytes(damaged)
        pack = gl.pack("a.txt", model=model)
        pack.cache()
        assert pack.filled_from == "the model" and path.read_bytes() == whole


def test_a_cache_of_a_read_only_folder_serves_all_the_same(
    model: gl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write({"a.txt": "x"})
    gl.pack("a.txt", model=model).cache()

    def refuse(path: Any) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(os, "utime", refuse)
    again = gl.pack("a.txt", model=model)
    again.cache()
    assert again.filled_from == "disk"


def test_the_oldest_caches_go_where_there_are_too_many_bytes(model: gl.Model, kept: Path) -> None:
    _write({f"{name}.txt": name * 50 for name in "abc"})

    def fill(name: str, most: int) -> str | None:
        pack = gl.pack(f"{name}.txt", model=model, max_cache_bytes=most)
        pack.cache()
        time.sleep(0.01)
        return pack.filled_from

    fill("a", 1 << 30)
    size = next(kept.iterdir()).stat().st_size
    fill("b", 1 << 30)
    assert fill("a", 1 << 30) == "disk", "it is the newest again"
    old = kept / ".x.safetensors-ab"
    old.write_bytes(b"left behind")
    os.utime(old, (0, 0))
    fill("c", int(2.5 * size))
    assert len(list(kept.iterdir())) == 2 and not old.exists()
    assert [fill(name, 1 << 30) for name in "acb"] == ["disk", "disk", "the model"]
    with pytest.warns(UserWarning, match="not kept on disk; expected at most 10 B"):
        gl.pack("b.txt", model=model, system="new", max_cache_bytes=10).cache()


def test_a_cache_that_can_not_be_kept_is_a_warning(
    model: gl.Model, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write({"a.txt": "x", "file": "x"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("file").absolute()))
    with pytest.warns(UserWarning, match="is not kept on disk"):
        assert gl.pack("a.txt", model=model).generate(QUESTION, max_new_tokens=1).ids.size
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kept_caches.folder() == Path.home() / ".cache" / "gemloupe" / "packs"


def test_edits_and_captures_reach_the_documents(model: gl.Model) -> None:
    _write({"a.txt": "27 + 45 is 72", "b.txt": "nothing"})
    pack = gl.pack(["a.txt", "b.txt"], model=model)
    span, point = pack.spans["a.txt"], "layers.2.resid_post"
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "logprobs": 1}
    plain = pack.generate(QUESTION, **options)
    out = pack.generate(QUESTION, capture={point: gl.at(span)}, **options)
    run = model.run(pack.ask(QUESTION), capture=point)
    np.testing.assert_array_equal(out.captured[point], run[point][span])
    assert len(out.captured[point]) == pack.documents[0].tokens
    assert out.logprobs == plain.logprobs
    edit = {"layers.1.resid_post": gl.edits.zero(positions=span)}
    edited = pack.generate(QUESTION, edit=edit, **options)
    assert edited.logprobs != plain.logprobs
    assert edited.logprobs == model.generate(pack.ask(QUESTION), edit=edit, **options).logprobs
    assert pack.generate(QUESTION, **options).logprobs == plain.logprobs


def test_every_adapter_reads_the_documents_itself(tmp_path: Path, kept: Path) -> None:
    _write({"a.txt": "27 + 45 is 72"})
    model = gl.load("demo:edge", invariant=True)
    model.load_adapter(write_adapter(tmp_path / "mine", docs_blocks.DEMO), scale=0.3)
    pack = gl.pack("a.txt", model=model)
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "logprobs": 1}
    plain = pack.generate(QUESTION, **options)
    before = list(kept.iterdir())
    mine = pack.generate(QUESTION, adapter="mine", **options)
    assert mine.logprobs != plain.logprobs and list(kept.iterdir()) == before
    whole = model.generate(pack.ask(QUESTION), adapter="mine", **options)
    assert mine.logprobs == whole.logprobs
    assert pack.generate(QUESTION, **options).logprobs == plain.logprobs
    model.merge_adapter("mine")
    merged = pack.generate(QUESTION, **options)
    assert merged.logprobs == model.generate(pack.ask(QUESTION), **options).logprobs
    assert list(kept.iterdir()) == before


def test_overridden_weights_read_the_documents_themselves(model: gl.Model, kept: Path) -> None:
    _write({"a.txt": "27 + 45 is 72"})
    pack = gl.pack("a.txt", model=model)
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "logprobs": 1}
    plain = pack.generate(QUESTION, **options)
    before = list(kept.iterdir())
    name = "layers.1.mlp.down_proj.weight"
    with model.override({name: np.zeros_like(model.weights[name])}):
        changed = pack.generate(QUESTION, **options)
        whole = model.generate(pack.ask(QUESTION), **options)
    assert changed.logprobs == whole.logprobs != plain.logprobs
    assert list(kept.iterdir()) == before
    assert pack.generate(QUESTION, **options).logprobs == plain.logprobs


# PDFs.


def test_pages_of_a_pdf_stand_at_their_spans(model: gl.Model) -> None:
    write_pdf(Path("r.pdf"), ["First page\nof three", "", "Third"])
    pack = gl.pack("r.pdf", model=model)
    prompt = pack.ask(QUESTION)
    assert _text(model, prompt, pack.spans["r.pdf#page=1"]) == "First page\nof three\n"
    assert _text(model, prompt, pack.spans["r.pdf#page=3"]) == "Third\n"
    assert pack.left_out == (("r.pdf#page=2", "holds no text (a picture?)"),)
    assert _text(model, prompt, pack.spans["r.pdf"]) == (
        "[page 1]\nFirst page\nof three\n[page 3]\nThird\n"
    )
    chosen = gl.pack(["r.pdf#page=2-3", "r.pdf#page=1"], model=model)
    assert list(chosen.spans) == [
        "r.pdf#page=2-3", "r.pdf#page=3", "r.pdf#page=1-1", "r.pdf#page=1",
    ]  # fmt: skip
    write_pdf(Path("scan.pdf"), ["", ""])
    with pytest.raises(ValueError, match='holds no text on its pages; pages="images" shows'):
        gl.pack("scan.pdf", model=model)
    with pytest.raises(ValueError, match=r"r\.pdf: has 3 pages"):
        gl.pack("r.pdf#page=4", model=model)


def test_pages_can_be_read_as_images(seeing: gl.Model) -> None:
    write_pdf(Path("r.pdf"), ["First", "Second"])
    _write({"a.txt": "x"})
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "logprobs": 1}
    pack = gl.pack(["r.pdf", "a.txt"], model=seeing, pages="images", page_tokens=70)
    prompt = pack.ask("hi")
    assert [medium.kind for medium in prompt.media] == ["image", "image"]
    for medium, page in zip(prompt.media, (1, 2), strict=True):
        span = pack.spans[f"r.pdf#page={page}"]
        assert 40 < len(medium.positions) <= 70 and len(medium.soft_tokens)
        assert span.start < medium.positions[0] < medium.positions[-1] < span.stop
    first, second = (medium.content.source.pixels for medium in prompt.media)
    assert first.min() < 100 and first.max() == 255 and (first != second).any()
    out = pack.generate("hi", **options)
    whole = seeing.generate(prompt, **options)
    assert out.logprobs == whole.logprobs and out.timings.prefill_tokens < 30
    again = gl.pack(["r.pdf", "a.txt"], model=seeing, pages="images", page_tokens=70)
    assert again.generate("hi", **options).logprobs == whole.logprobs
    assert again.filled_from == "disk"
    write_pdf(Path("r.pdf"), ["First", "Secant"])
    other = gl.pack(["r.pdf", "a.txt"], model=seeing, pages="images", page_tokens=70)
    np.testing.assert_array_equal(other.ids, pack.ids)
    other.cache()
    assert other.filled_from == "the model", "the pictures are others"


def test_a_question_may_bring_an_image(seeing: gl.Model) -> None:
    _write({"a.txt": "x"})
    picture = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
    parts = [{"type": "image", "image": picture, "max_soft_tokens": 70},
             {"type": "text", "text": "hi"}]  # fmt: skip
    pack = gl.pack("a.txt", model=seeing)
    chat = [{"role": "user", "content": parts}]
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "logprobs": 1}
    out = pack.generate(chat, **options)
    whole = seeing.generate(pack.ask(chat), **options)
    assert len(whole.prompt.media) == 1 and out.logprobs == whole.logprobs


@pytest.mark.parametrize("pages", ["text", "images"])
def test_hostile_pdfs_end_with_a_reason(
    seeing: gl.Model, monkeypatch: pytest.MonkeyPatch, pages: str
) -> None:
    monkeypatch.setattr(pdf, "SECONDS", 1)
    good = write_pdf(Path("good.pdf"), ["fine"]).read_bytes()
    draws, forms = b"BT /F1 9 Tf (x) Tj ET /X Do", "/XObject << /X 100 0 R >>"
    itself = f"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << {forms} >>"
    write_pages(Path("top_cycle.pdf"), [draws], {100: stream(b"/X Do", itself)}, forms)
    write_pages(Path("top_forms.pdf"), [draws], nested_forms(12, 60), forms)
    write_pages(Path("top_bomb.pdf"), [b""], {11: stream(b" " * (1 << 27), packed=True)})
    files = {
        "top_cut.pdf": good[: len(good) // 2],
        "top_text.pdf": b"no PDF at all",
        "top_head.pdf": b"%PDF-1.4\n",
        "top_noise.pdf": b"%PDF-1.4\n" + np.random.default_rng(0).bytes(5000),
        "top_loop.pdf": good.replace(b"/Kids [10 0 R]", b"/Kids [2 0 R] "),
        "top_huge.pdf": good.replace(b"[0 0 300 200]", b"[0 0 1e9 0.1]"),
    }
    for name, data in files.items():
        Path(name).write_bytes(data)
    began = time.monotonic()
    names = sorted(map(str, Path().glob("top_*.pdf")))
    pack = gl.pack([*names, "good.pdf"], model=seeing, pages=pages, page_tokens=70)
    assert "good.pdf" in _names(pack)
    seen = {name.partition("#")[0] for name, _reason in pack.left_out} | set(_names(pack))
    assert seen == {*names, "good.pdf"}, "each is either read or left out with a reason"
    assert {"top_text.pdf", "top_head.pdf", "top_noise.pdf"} <= set(dict(pack.left_out))
    assert time.monotonic() - began < 30
    assert not any(str(Path.cwd()) in reason for _name, reason in pack.left_out)


def test_time_and_memory_of_a_pdf_are_bounded(
    model: gl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = stream(b"BT /F1 9 Tf (x) Tj ET " * 1_000_000, packed=True)
    write_pages(Path("endless.pdf"), [b""], {11: many})
    monkeypatch.setattr(pdf, "SECONDS", 1)
    with pytest.raises(ValueError, match=r"endless\.pdf: takes more than 1 s to read"):
        gl.pack("endless.pdf", model=model)
    monkeypatch.setattr(pdf, "MEMORY", 24 << 20)
    write_pdf(Path("good.pdf"), ["fine"])
    with pytest.raises(ValueError, match=r"good\.pdf: (can't be read|ends the program)"):
        gl.pack("good.pdf", model=model)


def test_pdfs_are_bounded_in_bytes_and_pages(
    model: gl.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pdf(Path("r.pdf"), ["x"] * 5)
    monkeypatch.setattr(pdf, "MAX_PAGES", 4)
    with pytest.raises(ValueError, match="too long: 5 pages; choose up to 4"):
        gl.pack("r.pdf", model=model)
    assert len(gl.pack("r.pdf#page=2-5", model=model).documents[0].pages) == 4
    with pytest.raises(ValueError, match="too long: pages 1 to 5"):
        gl.pack("r.pdf#page=1-5", model=model)
    monkeypatch.setattr(pdf, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="too long: more than 100 B"):
        gl.pack("r.pdf#page=1", model=model)


def test_a_pdf_with_a_password_is_named(model: gl.Model) -> None:
    writer = pypdf.PdfWriter(clone_from=write_pdf(Path("open.pdf"), ["secret"]))
    writer.encrypt("word", algorithm="RC4-128")
    writer.write("closed.pdf")
    with pytest.raises(ValueError, match=r"closed\.pdf: can't be read \(ValueError: needs a pass"):
        gl.pack("closed.pdf", model=model)


def test_without_the_extra_it_is_named(model: gl.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pdf(Path("r.pdf"), ["x"])
    monkeypatch.setattr(pdf, "_LIBRARIES", {"text": "no_such_library"})
    with pytest.raises(ImportError, match=r'pip install "gemloupe\[documents\]"'):
        gl.pack("r.pdf", model=model)


# The command line.


def test_a_chat_about_documents_reads_them_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: Path
) -> None:
    _write({"src/a.py": "x = 1\n", "src/b.bin": b"\0", "notes.md": "hello"})
    command = ["chat", "--with", "src", "notes.md", "--temperature", "0", "--max-new-tokens", "9"]

    def talk(*more: str) -> tuple[str, str]:
        monkeypatch.setattr(
            sys, "stdin", io.StringIO(f"{QUESTION}\nand 3 + 9?\n/reset\n{QUESTION}")
        )
        assert cli.main([*command, *more]) == 0
        out, err = capsys.readouterr()
        return out, err

    out, err = talk()
    assert "src/a.py" in err and "src/b.bin: binary" in err and ", from the model" in err
    again, err = talk()
    assert again == out and ", from disk" in err
    fresh, err = talk("--no-cache")
    assert fresh == out and ", from the model" in err
    model = gl.load("demo:edge")
    first = gl.pack(["src", "notes.md"], model=model).generate(
        QUESTION, temperature=0, max_new_tokens=9
    )
    said = out.split("The conversation is forgotten.")
    assert said[0].startswith(first.text) and said[1].strip() == first.text.strip()
    assert cli.main(["chat", "--with", "nothing"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
