"""`gl.help("hooks")`: pages for researchers, kept as Markdown in `gemloupe/docs`."""

from __future__ import annotations

import re
from importlib import resources

from gemloupe import _core
from gemloupe.errors import close_matches, did_you_mean, one_of, quoted

# In reading order.
PAGES = (
    "hooks",
    "semantics",
    "images",
    "audio",
    "documents",
    "numbers",
    "adapters",
    "errors",
    "evaluate",
    "chat",
    "serve",
    "cluster",
    "security",
    "from_transformer_lens",
    "from_transformers",
    "from_nnsight",
    "from_llama_cpp",
)
_TABLE = "<!-- hook table -->"


def help(topic: str | None = None) -> None:
    """Prints a page, such as gl.help("hooks"); without a topic, the list of pages.

    A topic is a page's name or title, in any spelling near it, or a hook point's name
    ("layers.3.attn.z", "blocks.3.attn.hook_z"), of which the table's row is shown. KeyError, with
    close matches, for anything else.
    """
    print(contents() if topic is None else text(topic))


def contents() -> str:
    """The names and titles of the pages."""
    width = max(map(len, PAGES))
    lines = [f'  gl.help("{page}"){" " * (width - len(page))}  {title(page)}' for page in PAGES]
    return "\n".join(["Pages:", *lines, 'gl.help("layers.3.attn.z") shows one hook point.'])


def text(topic: str) -> str:
    """What `help` prints for a topic."""
    if not isinstance(topic, str):
        raise TypeError(f"topic is {quoted(topic)}; expected a text, such as {PAGES[0]!r}")
    if (point := _hook_point(topic)) is not None:
        return point
    page = _find(topic)
    return _read(page).replace(_TABLE, hook_table())


def title(page: str) -> str:
    """The heading of a page."""
    return _read(page).split("\n", 1)[0].removeprefix("# ")


def hook_table() -> str:
    """The engine's hook points as a Markdown table; "{i}" stands for a layer's number."""
    header = ("name", "shape", "transformers", "TransformerLens")
    rows = [header, *(_cells(row) for row in _core.hook_points())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
    return "\n".join(lines)


def _cells(row: tuple) -> tuple[str, ...]:
    name, is_layers, shape, editable, transformers, lens = row
    full = f"layers.{{i}}.{name}" if is_layers else name
    return full, shape if editable else f"{shape} (read only)", transformers, lens


def _read(page: str) -> str:
    return (resources.files("gemloupe") / "docs" / f"{page}.md").read_text(encoding="utf-8")


def _plain(name: str) -> str:
    """The words of a name: "from_llama_cpp", "From llama.cpp" -> "from llama cpp"."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _find(topic: str) -> str:
    """The page that a topic means: by name, by title, by a part of one of them, or nearly."""
    wanted = _plain(topic)
    names = {_plain(page): page for page in PAGES}
    names |= {_plain(title(page)): page for page in PAGES}
    if wanted in names:
        return names[wanted]
    parts = {page for name, page in names.items() if wanted and wanted in name}
    near = {names[match] for match in close_matches(wanted, names)}
    for found in (parts, near):
        if len(found) == 1:
            return found.pop()
    candidates = sorted(parts | near, key=PAGES.index)
    hint = f"Did you mean {one_of(candidates)}?" if candidates else ""
    pages = f"Pages are {one_of(PAGES)}."
    raise KeyError(f"no help on {quoted(topic)}. {hint or did_you_mean(topic, PAGES)} {pages}")


def _hook_point(topic: str) -> str | None:
    """The lines on one hook point, None where the topic names none."""
    general = re.sub(r"\b(layers|blocks)\.(\d+|\*)\.", r"\1.{i}.", topic)
    general = re.sub(r"^model\.(language_model\.)?", "", general)
    meanings = hook_meanings()
    for row in _core.hook_points():
        name, shape, transformers, lens = _cells(row)
        if general in (name, row[0], transformers, lens) and general:
            base = row[0].removesuffix(".scale")
            meaning = meanings.get(row[0]) or f"the divisor of the norm {base}"
            lines = [f"{name}  {shape}", f"  {meaning}"]
            lines += [f"  transformers: {transformers}"] if transformers else []
            lines += [f"  TransformerLens: {lens}"] if lens else []
            return "\n".join([*lines, '  gl.help("hooks") explains the letters.'])
    return None


def hook_meanings() -> dict[str, str]:
    """What each point holds, from the page on hooks: name without its layer -> one sentence."""
    return dict(re.findall(r"^- `([\w.]+)`: (.+)$", _read("hooks"), re.MULTILINE))
