"""What is seen of a KV cache: differences, provenance, tables, bytes and the plot."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest

import gemloupe as gl
from cache_helpers import LONG, filled, load, sources
from gemloupe.cache_table import ranges
from tiny_models import VARIANTS, random_ids

# diff


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_difference_is_found_where_it_was_made(tiny: Callable, variant: str) -> None:
    cache = filled(load(tiny, variant), sliding="full")
    fork = cache.fork()
    same = cache.diff(fork)
    assert not same and same.first is None and same.first_position is None and same.max_abs == 0
    assert "no difference" in repr(same)
    first, last = sources(cache)[1], sources(cache)[-1]
    values = np.array(fork.layers[last].values[[7]])
    fork.layers[last].set(values=values + 0.25, positions=[7])
    keys = np.array(fork.layers[first].keys[[90, 91]])
    fork.layers[first].set(keys=keys * 2, positions=[90, 91])
    diff = cache.diff(fork)
    assert diff and diff.first == (first, 90) and diff.first_position == 7
    by_layer = {layer.layer: layer for layer in diff.layers}
    assert list(by_layer) == sources(cache)
    assert by_layer[last].values[7] == pytest.approx(0.25, rel=1e-5)
    assert by_layer[first].keys_relative[90] == pytest.approx(0.5)
    assert by_layer[first].keys[91] == np.abs(keys[1]).max()
    assert (by_layer[first].values == 0).all() and by_layer[sources(cache)[0]].first is None
    assert re.search(rf"{first} +90 +2 of {LONG}", diff.table())
    assert f"first in layer {first} at position 90" in repr(diff)


def test_a_ring_is_compared_with_a_full_cache_where_both_hold_positions(tiny: Callable) -> None:
    model = load(tiny, "31b")
    ring, full = filled(model), filled(model, sliding="full")
    diff = ring.diff(full)
    assert not diff
    assert np.array_equal(diff.layers[0].positions, ring.layers[0].positions)


def test_not_a_number_differs_from_numbers_only(tiny: Callable) -> None:
    cache = filled(load(tiny, "e2b"), 20)
    layer = cache.layers[3]
    layer.set(values=np.full((1, 1, 20), np.nan), positions=[4])
    fork = cache.fork()
    assert not cache.diff(fork)
    fork.layers[3].set(values=np.zeros((1, 1, 20)), positions=[4])
    diff = cache.diff(fork)
    assert diff.first == (3, 4) and diff.max_abs == np.inf


def test_caches_that_cannot_be_compared_are_refused(tiny: Callable) -> None:
    model = load(tiny, "e2b")
    cache = filled(model, 20)
    with pytest.raises(ValueError, match="positions 0 to 18; expected 0 to 19"):
        cache.diff(filled(model, 19))
    with pytest.raises(ValueError, match="positions 1 to 20; expected 0 to 19"):
        cache.diff(filled(model, 20, start=1))
    with pytest.raises(ValueError, match="another model"):
        cache.diff(filled(load(tiny, "e2b"), 20))


# provenance


def test_provenance_names_what_changed_a_cache(tiny: Callable) -> None:
    model = load(tiny, "31b")
    cache, other = filled(model, 20), filled(model, 20, seed=2)
    assert cache.provenance == ()
    other.note("edit", "layers.3.resid_post: zero()")
    cache.layers[1].set(values=np.zeros((2, 4, 12)), positions=[3, 4])
    cache.remove([5])
    cache.insert(other, 19)
    cache.remove([5])
    fork = cache.fork()
    cache.replace(fork, layers=slice(0, 3), positions=[0])
    seen = [(note.kind, note.detail, note.length) for note in cache.provenance]
    assert seen == [
        ("set", "layer 1, values of 2 positions", 20),
        ("remove", "position 5", 19),
        ("edit", "layers.3.resid_post: zero()", 39),
        ("insert", "20 positions before 19", 39),
        ("replace", "position 0 in layers 0–2", 38),
    ]
    assert fork.provenance == cache.provenance[:-1]


def test_use_under_another_adapter_warns(tiny: Callable, recwarn: pytest.WarningsRecorder) -> None:
    model = load(tiny, "e2b")
    cache = model.new_cache()
    cache.note_adapter("poet")
    cache.core.append_random(random_ids(5), 1)
    cache.note_adapter("poet")
    base = filled(model, 5)
    base.note_adapter()
    assert not recwarn.list and base.provenance == ()
    with pytest.warns(UserWarning, match="computed under adapter poet, and is now used under none"):
        cache.note_adapter()
    with pytest.warns(UserWarning, match="computed under adapter none, and is now used under poet"):
        base.note_adapter("poet")
    assert [note.detail for note in base.provenance] == ["none", "poet"]


# tables


def test_ranges_are_short() -> None:
    assert ranges([0, 1, 2, 3, 5, 7, 8]) == "0–3, 5, 7–8"
    assert ranges([]) == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tables_name_every_kind_of_layer(tiny: Callable, variant: str) -> None:
    cache = filled(load(tiny, variant))
    shown = repr(cache)
    assert shown.startswith("KvCache(positions 0…149, at most 262144 tokens, float32, ")
    lines = shown.splitlines()[2:]
    kinds = {layer.kind for layer in cache.layers}
    assert kinds == {re.sub(r"^ +[\d–, ]+? {2,}(\w+).*", r"\1", line) for line in lines}
    if "shared" in kinds:
        assert f"shared, reads {cache.layers[-1].source_layer}" in shown
    else:
        assert "derived" in shown
    first = cache.layers[0].positions[0]
    assert f"{first}…149" in shown
    assert "empty" in repr(load(tiny, variant).new_cache())


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_html_table_is_well_formed_and_has_no_colours_of_its_own(tiny: Callable) -> None:
    cache = filled(load(tiny, "e2b"))
    html = cache._repr_html_()
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert len(tags.cells) % 7 == 0 and "shared, reads 3" in tags.cells
    assert "#" not in html and "color:inherit" in html


# bytes


def test_a_fork_shares_every_block_until_one_writes(tiny: Callable) -> None:
    cache = filled(load(tiny, "31b"), sliding="full")
    assert cache.shared_nbytes == 0
    fork = cache.fork()
    assert fork.shared_nbytes == cache.shared_nbytes == cache.nbytes
    layer = fork.layers[0]
    block = layer.nbytes // 3
    layer.set(values=layer.values[:1], positions=[0])
    assert cache.nbytes - cache.shared_nbytes == fork.nbytes - fork.shared_nbytes == block
    assert sum(one.nbytes for one in cache.layers) == cache.nbytes


# plot


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_the_plot_has_a_bar_for_every_layer(tiny: Callable, variant: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    cache = filled(load(tiny, variant))
    ax = gl.plot.cache(cache)
    bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    rows = {round(bar.get_y() + bar.get_height() / 2) for bar in bars}
    assert rows == set(range(len(cache.layers)))
    for layer in cache.layers:
        of_layer = [bar for bar in bars if round(bar.get_y() + 0.35) == layer.index]
        assert sum(bar.get_width() for bar in of_layer) == LONG
        filled_bars = [bar for bar in of_layer if bar.get_facecolor()[3] > 0]
        held = 0 if layer.kind == "shared" else len(layer.positions)
        assert sum(bar.get_width() for bar in filled_bars) == held
        if layer.kind == "sliding":
            assert filled_bars[-1].get_width() == layer.window - 1
    assert ax.get_xlabel() == "position" and ax.get_ylabel() == "layer"
    assert ax.figure.patch.get_alpha() == 0
    lanes = [line for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert len(lanes) == (2 if variant == "e2b" else 0)
    pyplot.close(ax.figure)
    empty = gl.plot.cache(load(tiny, variant).new_cache())
    pyplot.close(empty.figure)
