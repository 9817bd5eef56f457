"""Prompts that go on from what earlier ones read get the bits that they would get alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

import gemloupe as gl
from adapter_files import write_adapter
from gemloupe import _core
from gemloupe.generation import Generation, make_rows
from gemloupe.prefix_cache import pass_ends
from gemloupe.serving.command import Options
from gemloupe.serving.limits import Limits
from serving import Server, running
from tiny_models import MEDIA_IDS, random_ids

# Longer than every window (7 to 12) and than a pass (512).
LONG = random_ids(700)
GREEDY = {"max_new_tokens": 4, "temperature": 0, "logprobs": 8, "routing": False}
# Models whose float products depend on the rows of a pass, and models in which none do.
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4-int8kv": {"dtype": "int4", "kv_dtype": "int8"},
    "invariant": {"dtype": "float32", "invariant": True, "kv_dtype": "bfloat16"},
}
ANYWHERE = ("int8", "int4", "int4-int8kv", "invariant")


@pytest.fixture(scope="module")
def load(tiny: Callable) -> Callable[..., gl.Model]:
    made: dict[tuple[str, str], gl.Model] = {}

    def get(variant: str = "e2b", kind: str = "int4") -> gl.Model:
        if (variant, kind) not in made:
            made[variant, kind] = gl.load(tiny(variant, dtype="bfloat16")[1], **KINDS[kind])
        return made[variant, kind]

    return get


def generate(model: gl.Model, ids: Any, prefixes: Any = None, **arguments: Any) -> Any:
    return model.generate(ids, prefix_cache=prefixes, **{**GREEDY, **arguments})


def cached(out: Any) -> int:
    assert out.timings.cached_tokens + out.timings.prefill_tokens == len(out.prompt)
    return out.timings.cached_tokens


def assert_same(warm: Any, cold: Any) -> None:
    assert warm.ids.tolist() == cold.ids.tolist()
    assert warm.logprobs == cold.logprobs
    assert warm.prompt_logprobs == cold.prompt_logprobs
    assert warm.cache.tokens.tolist() == cold.cache.tokens.tolist()
    for mine, theirs in zip(warm.cache.layers, cold.cache.layers, strict=True):
        held = min(len(mine.positions), len(theirs.positions))
        assert np.array_equal(mine.keys[-held:], theirs.keys[-held:])
        assert np.array_equal(mine.values[-held:], theirs.values[-held:])


@pytest.mark.core  # repeated for every instruction set
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["e2b", "26b", "31b"])
def test_a_warm_prompt_gets_the_bits_of_a_cold_one(load, variant: str, kind: str) -> None:
    model = load(variant, kind)
    prefixes = model.prefix_cache()
    tail = random_ids(40, seed=7)[1:]
    first = generate(model, LONG, prefixes)
    conversation = [*LONG, *first.ids.tolist(), *tail]
    for ids, fewest in (
        (LONG, 640),
        (conversation, 703),
        ([*LONG[:600], *tail], 512),
        (conversation[:300], 0),
        ([*random_ids(1050, seed=3)], 0),
        ([*random_ids(1050, seed=3), *tail], 1040),
    ):
        warm = generate(model, ids, prefixes)
        assert_same(warm, generate(model, ids))
        if kind in ANYWHERE or _core.isa() == "portable":
            assert cached(warm) >= fewest
        else:
            assert cached(warm) == fewest // 512 * 512


def test_short_prompts_go_on_anywhere_where_bits_allow_it(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache()
    system = random_ids(100)
    for seed in (3, 4):
        generate(model, [*system, *random_ids(50, seed=seed)[1:]], prefixes)
    third = [*system, *random_ids(50, seed=5)[1:]]
    warm = generate(model, third, prefixes)
    assert cached(warm) == len(system)  # The second prompt was cut where it parts from the first.
    assert_same(warm, generate(model, third))


def test_one_conversation_that_branches_goes_on_from_each_branch(load) -> None:
    model = load("26b", "int8")
    prefixes = model.prefix_cache()
    base = random_ids(150)
    answers = {}
    for seed in (1, 2, 3):
        ids = [*base, *random_ids(80, seed=seed)[1:]]
        out = generate(model, ids, prefixes)
        answers[seed] = [*ids, *out.ids.tolist()]
    for seed in (1, 2, 3, 1):
        ids = [*answers[seed], *random_ids(9, seed=9)[1:]]
        warm = generate(model, ids, prefixes)
        assert cached(warm) >= len(answers[seed]) - 1
        assert_same(warm, generate(model, ids))


def test_an_edited_request_leaves_nothing_to_the_unedited_one(load) -> None:
    for kind in ("int4", "float32"):
        model = load("e2b", kind)
        prefixes = model.prefix_cache()
        edit = {"layers.1.resid_post": gl.edits.add(np.ones(44, np.float32), positions=[20])}
        edited = generate(model, LONG, prefixes, edit=edit)
        assert len(prefixes) == 0
        warm, cold = generate(model, LONG, prefixes), generate(model, LONG)
        assert_same(warm, cold)
        assert cached(warm) == 0 and edited.logprobs != cold.logprobs


def test_an_edited_request_reads_only_what_its_edits_can_not_reach(load) -> None:
    for kind in ("int4", "float32"):
        model = load("e2b", kind)
        prefixes = model.prefix_cache()
        generate(model, LONG, prefixes)
        for position, expected in ((600, 512), (-1, 512), (40, 0)):
            edit = {"layers.1.resid_post": gl.edits.scale(2.0, positions=position)}
            warm = generate(model, LONG, prefixes, edit=edit)
            assert cached(warm) == expected
            assert_same(warm, generate(model, LONG, edit=edit))
        # All rows of a pass with such an edit take another path through attention.
        unfused = {"layers.1.attn.k": gl.edits.scale(2.0, positions=-1)}
        assert cached(generate(model, LONG, prefixes, edit=unfused)) == 0
        assert_same(generate(model, LONG, prefixes), generate(model, LONG))


def test_edit_functions_count_the_passes_that_they_would_have_cold(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache()
    generate(model, LONG, prefixes)

    def steps(prefixes: Any) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []

        def note(x: np.ndarray, at: Any) -> None:
            seen.append((at.phase, at.step))

        edit = {"layers.1.resid_post": gl.edits.function(note, positions=slice(-1, None))}
        assert (cached(generate(model, LONG, prefixes, edit=edit)) > 0) == (prefixes is not None)
        return seen

    assert steps(prefixes) == steps(None)
    assert steps(None)[:2] == [("prefill", 1), ("decode", 2)]


def test_captures_over_cached_positions_compute_them(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache()
    generate(model, LONG, prefixes)
    everywhere = ("layers.*.resid_post", "layers.1.attn.z")
    by_pass = ("layers.0.attn.pattern", "layers.0.attn.keys")
    for capture, fewest, most in (
        (everywhere, 0, 0),
        (by_pass, 0, 0),
        ({"layers.*.resid_post": gl.at([-3, -1])}, 640, 697),
        ({"layers.2.mlp.out": gl.at(slice(650, None), reduce="mean")}, 640, 650),
    ):
        warm = generate(model, LONG, prefixes, capture=capture)
        cold = generate(model, LONG, capture=capture)
        assert_same(warm, cold)
        assert fewest <= cached(warm) <= most
        assert list(warm.captured) == list(cold.captured)
        for name, value in cold.captured.items():
            pairs = zip(
                *([v if isinstance(v, list) else [v] for v in (warm.captured[name], value)]),
                strict=True,
            )
            assert all(np.array_equal(a, b) for a, b in pairs)
    cold = generate(model, LONG, prompt_logprobs=3)
    warm = generate(model, LONG, prefixes, prompt_logprobs=3)
    assert_same(warm, cold)
    assert cached(warm) == 0


def test_router_traces_compute_the_whole_prompt(load) -> None:
    model = load("26b", "int4")
    prefixes = model.prefix_cache()
    generate(model, LONG, prefixes)
    warm = generate(model, LONG, prefixes, routing="full")
    cold = generate(model, LONG, routing="full")
    assert_same(warm, cold)
    assert cached(warm) == 0 and np.array_equal(warm.routing.logits, cold.routing.logits)


@pytest.mark.parametrize("variant", ["e2b", "31b"])  # 31b's pictures see themselves whole.
def test_equal_ids_with_other_pictures_share_nothing_of_them(tiny, tmp_path, variant: str) -> None:
    folder = shutil.copytree(tiny(variant, dtype="bfloat16")[1], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | MEDIA_IDS))
    model = gl.load(folder, dtype="int4")
    width = model.config.text.hidden_size
    pictures = [np.random.default_rng(s).normal(size=(30, width)).astype("f") for s in (0, 1)]
    ids = [*range(101, 201), 10, *[12] * 30, 11, *range(80, 120)]
    question = [*ids, *range(150, 170)]
    prefixes = model.prefix_cache()
    generate(model, ids, prefixes, images=[pictures[0]])
    other = generate(model, question, prefixes, images=[pictures[1]])
    assert cached(other) <= 101
    assert_same(other, generate(model, question, images=[pictures[1]]))
    same = generate(model, question, prefixes, images=[pictures[0].copy()])
    assert cached(same) >= len(ids) - 1
    assert_same(same, generate(model, question, images=[pictures[0]]))
    assert same.logprobs != other.logprobs
    inside = [*ids[:110], *range(90, 120)]  # It parts inside the picture.
    warm = generate(model, inside, prefixes, images=[pictures[0][:9]])
    assert cached(warm) <= 101
    assert_same(warm, generate(model, inside, images=[pictures[0][:9]]))


def test_pictures_that_an_edit_encodes_anew_are_encoded_once(tiny, monkeypatch) -> None:
    model = gl.load(tiny("e2b", towers="tiny", media_ids=True)[1], dtype="int4")
    vision, encoded = model.vision, []
    assert vision is not None
    encode = type(vision).encode
    monkeypatch.setattr(
        type(vision), "encode", lambda *given: encoded.append(given) or encode(*given)
    )
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = model.config.image_token_id
    count = model.vision.read(picture, "image", 70).lengths[0]
    ids = [*range(101, 141), *[image] * count, *range(80, 90)]
    edit = {"vision.soft_tokens": gl.edits.scale(2.0)}
    arguments: dict[str, Any] = {"images": picture, "edit": edit, "max_soft_tokens": 70}
    warm = generate(model, ids, model.prefix_cache(), **arguments)
    assert len(encoded) == 1
    assert_same(warm, generate(model, ids, **arguments))


def test_adapters_with_their_scales_have_prefixes_of_their_own(tiny, tmp_path) -> None:
    folder = tiny("e2b", dtype="bfloat16")[1]
    model = gl.load(folder, invariant=True)
    model.load_adapter(write_adapter(tmp_path / "a", folder, rank=2), name="a")
    prefixes = model.prefix_cache()
    chosen = (None, "a", {"a": 0.5})
    cold = [generate(model, LONG, adapter=adapter) for adapter in chosen]
    for adapter, expected in zip(chosen, cold, strict=True):
        out = generate(model, LONG, prefixes, adapter=adapter)
        assert cached(out) == 0
        assert_same(out, expected)
    for adapter, expected in zip(chosen, cold, strict=True):
        out = generate(model, LONG, prefixes, adapter=adapter)
        assert cached(out) >= 640
        assert_same(out, expected)
    held = prefixes.nbytes
    model.delete_adapter("a")
    assert 0 < prefixes.nbytes < held
    model.load_adapter(write_adapter(tmp_path / "b", folder, seed=3), name="a")
    again = generate(model, LONG, prefixes, adapter="a")
    assert cached(again) == 0 and again.logprobs != cold[1].logprobs
    model.merge_adapter("a")
    assert len(prefixes) == 0 and prefixes.nbytes == 0
    merged = generate(model, LONG, prefixes)
    assert cached(merged) == 0 and merged.logprobs != cold[0].logprobs
    model.unmerge_adapter()
    assert_same(generate(model, LONG, prefixes), cold[0])


def test_a_row_that_runs_while_weights_change_stores_nothing(tiny, tmp_path) -> None:
    folder = tiny("e2b", dtype="bfloat16")[1]
    model = gl.load(folder, dtype="int4")
    adapter = model.load_adapter(write_adapter(tmp_path / "a", folder), name="a")
    prefixes = model.prefix_cache()
    rows = make_rows(model, LONG, {**GREEDY, "prefix_cache": prefixes})
    generation = Generation(model, rows, stream=False)
    generation.step()
    assert len(prefixes) == 1
    model.merge_adapter(adapter)
    while not generation.done:
        generation.step()
    assert len(prefixes) == 0


def test_a_merge_that_fails_leaves_no_prefixes_that_nobody_can_use(
    tiny, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("e2b", dtype="bfloat16")[1]
    model = gl.load(folder, dtype="int4")
    adapter = model.load_adapter(write_adapter(tmp_path / "a", folder), name="a")
    prefixes = model.prefix_cache()
    cold = generate(model, LONG, prefixes)

    def fail(*_: Any) -> None:
        raise MemoryError("no room for copies")

    monkeypatch.setattr(_core, "merge_adapters", fail)
    with pytest.raises(MemoryError, match="no room"):
        model.merge_adapter(adapter)
    assert len(prefixes) == 0 and prefixes.nbytes == 0
    assert_same(generate(model, LONG, prefixes), cold)
    assert cached(generate(model, LONG, prefixes)) >= 640


def test_overridden_weights_neither_read_nor_leave_prefixes(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache()
    plain = generate(model, LONG, prefixes)
    held = len(prefixes)
    name = "layers.0.mlp.down_proj.weight"
    with model.override({name: 1.5 * model.weights[name]}):
        changed = generate(model, LONG, prefixes)
        assert_same(changed, generate(model, LONG))
    assert cached(changed) == 0 and len(prefixes) == held
    assert changed.logprobs != plain.logprobs
    assert_same(generate(model, LONG, prefixes), plain)


def test_what_was_used_longest_ago_goes_at_the_limit(load) -> None:
    model = load("31b", "int4")
    whole = model.prefix_cache()
    prompts = [random_ids(300, seed=seed) for seed in range(6)]
    generate(model, prompts[0], whole)
    limit = 3 * whole.nbytes + whole.nbytes // 2
    prefixes = model.prefix_cache(limit)
    for ids in prompts:
        generate(model, ids, prefixes)
        assert 0 < prefixes.nbytes <= limit
        generate(model, prompts[0], prefixes)  # Used all the time: it stays.
    assert prefixes.stats.evicted > 0
    assert cached(generate(model, prompts[0], prefixes)) > 200
    assert cached(generate(model, prompts[1], prefixes)) == 0
    small = model.prefix_cache(1000)
    assert_same(generate(model, LONG, small), generate(model, LONG))
    assert len(small) == 0 and small.nbytes == 0


def test_shared_blocks_count_once(load) -> None:
    model = load("31b", "int4")
    cache = model.new_cache()
    model.run(LONG, cache=cache)
    forks = [cache.core, cache.fork().core]
    assert _core.kv_total_bytes(forks) == cache.nbytes
    other = model.new_cache()
    model.run(LONG[:100], cache=other)
    assert _core.kv_total_bytes([*forks, other.core]) == cache.nbytes + other.nbytes


def test_threads_share_a_prefix_cache_and_cross_nothing(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache(400_000)
    prompts = [[*LONG[: 100 * n], *random_ids(30, seed=n)[1:]] for n in range(1, 7)]
    cold = [generate(model, ids) for ids in prompts]
    problems: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for n in range(12):
                index = (first + n * n) % len(prompts)
                assert_same(generate(model, prompts[index], prefixes), cold[index])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert prefixes.stats.hits > 10 and prefixes.nbytes <= 400_000


def test_batches_and_samples_draw_what_they_would_draw_cold(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache()
    generate(model, LONG, prefixes)
    batch = [LONG, [*LONG, *random_ids(9, seed=2)[1:]], random_ids(20, seed=5)]
    drawn = {"temperature": 1.0, "seed": [1, 2, 3], "repetition_penalty": 1.3, "max_new_tokens": 9}
    for warm, cold in zip(
        generate(model, batch, prefixes, **drawn), generate(model, batch, **drawn), strict=True
    ):
        assert_same(warm, cold)
    assert prefixes.stats.tokens > 1300


def test_rows_that_come_together_read_what_they_share_once(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache()
    tails = [random_ids(20 + n, seed=n)[1:] for n in range(5)]
    batch = [[*LONG, *tail] for tail in tails] + [LONG, LONG]
    for warm, cold in zip(generate(model, batch, prefixes), generate(model, batch), strict=True):
        assert_same(warm, cold)
    assert prefixes.stats.lookups == len(batch)
    assert prefixes.stats.tokens >= 640 * (len(batch) - 1)


def test_what_does_not_fit_together_is_refused(load) -> None:
    model, other = load("e2b", "int4"), load("26b", "int4")
    prefixes = model.prefix_cache()
    with pytest.raises(ValueError, match="of another model"):
        generate(other, LONG, prefixes)
    with pytest.raises(ValueError, match="from cache= or from a prefix cache"):
        generate(model, LONG, prefixes, cache=model.new_cache())
    with pytest.raises(TypeError, match="expected what model.prefix_cache made"):
        generate(model, LONG, prefixes=17)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="max_bytes"):
            model.prefix_cache(wrong)


def test_cleared_prefixes_are_gone(load) -> None:
    model = load("e2b", "int4")
    prefixes = model.prefix_cache()
    generate(model, LONG, prefixes)
    assert prefixes.nbytes > 0 and "1 hits" not in repr(prefixes)
    prefixes.clear()
    assert prefixes.nbytes == 0 and len(prefixes) == 0
    assert cached(generate(model, LONG, prefixes)) == 0
    assert dataclasses.asdict(prefixes.stats)["hits"] == 0


def test_passes_end_at_multiples_of_512_and_around_blocks_of_media() -> None:
    assert pass_ends(511, []) == []
    assert pass_ends(1024, []) == [512, 1024]
    assert pass_ends(2000, [(500, 600), (1100, 1300)]) == [500, 1012, 1524]
    assert pass_ends(2000, [(0, 700)]) == [700, 1212, 1724]


RULES = {"role": "system", "content": "You add numbers. " + "Think of every digit. " * 20}


def ask(http: httpx.Client, question: str, **fields: Any) -> dict[str, Any]:
    messages = [RULES, {"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    answer = http.post("/v1/chat/completions", json={**body, "max_tokens": 8, **fields})
    answer.raise_for_status()
    return answer.json()


def said(answer: dict[str, Any]) -> tuple[Any, Any]:
    return answer["choices"][0]["message"], answer["choices"][0]["logprobs"]


def of_prompt(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Server, httpx.Client]]]:
    with contextlib.ExitStack() as stack:

        def start(prefix_bytes: int | None = None) -> tuple[Server, httpx.Client]:
            limits = Limits(prefix_bytes=prefix_bytes)
            options = Options(load={"dtype": "int4"}, limits=limits)
            server = stack.enter_context(running("demo:edge", options))
            return server, stack.enter_context(httpx.Client(base_url=server.url, timeout=60))

        yield start


def test_a_server_answers_an_unedited_prompt_after_an_edited_one_as_a_new_server(serve) -> None:
    _, cold_http = serve()
    server, http = serve()
    question = "What is 27 + 45?"
    edit = {"layers.1.resid_post": {"do": "scale", "factor": 3.0, "positions": [5]}}
    edited = ask(http, question, edit=edit)
    assert len(server.scheduler.prefixes) == 0
    warm, cold = ask(http, question), ask(cold_http, question)
    assert said(warm) == said(cold) and said(edited) != said(cold)
    again = ask(http, question)
    assert said(again) == said(cold)
    assert of_prompt(again) > of_prompt(warm) == 0
    assert said(ask(http, question, edit=edit)) == said(edited)
    assert said(ask(http, question)) == said(cold)


def test_a_server_counts_what_it_did_not_read_and_forgets_it_in_the_end(serve) -> None:
    server, http = serve()
    first, second = (ask(http, f"What is 2 + {n}?") for n in (3, 4))
    assert of_prompt(first) == 0
    shared = of_prompt(second)
    assert 200 < shared < second["usage"]["prompt_tokens"]
    timings = second["choices"][0]["gemloupe"]["timings"]
    assert timings["cached_tokens"] == shared
    assert timings["prefill_tokens"] == second["usage"]["prompt_tokens"] - shared
    body = {"model": "x", "messages": [RULES, {"role": "user", "content": "What is 2 + 4?"}]}
    counted = http.post("/api/chat", json={**body, "stream": False}).json()["prompt_eval_count"]
    assert counted == second["usage"]["prompt_tokens"]
    metrics = http.get("/metrics").text
    assert 'gemloupe_prefix_hits_total{model="demo:edge"} 2' in metrics
    assert 'gemloupe_prefix_evicted_total{model="demo:edge"} 0' in metrics
    assert (
        f'gemloupe_prefix_bytes{{model="demo:edge"}} {server.scheduler.prefixes.nbytes}' in metrics
    )
    server.scheduler.close()
    assert len(server.scheduler.prefixes) == 0 and server.scheduler.prefixes.nbytes == 0


def test_clients_at_once_get_the_answers_of_a_server_that_keeps_nothing(serve) -> None:
    server, http = serve()
    plain, plain_http = serve(prefix_bytes=0)
    assert plain.scheduler.prefixes is None
    questions = [f"What is {n} + {n * n}?" for n in range(1, 9)]
    expected = [said(ask(plain_http, question)) for question in questions]
    assert "gemloupe_prefix_bytes_limit" in plain_http.get("/metrics").text
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            answers = list(pool.map(lambda question: ask(http, question), questions))
            assert [said(answer) for answer in answers] == expected
    several = ask(http, questions[0], n=3, seed=1)
    assert [choice["message"] for choice in several["choices"]] == [expected[0][0]] * 3
    assert server.scheduler.prefixes.stats.hits > 16
