"""gemloupe bench and the programs of benchmarks/: what they count, parse and print. No timings."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gemloupe as gl
from gemloupe import _core, bench, cli
from gemloupe.bench import Case, Spread
from gemloupe.variants import VARIANTS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import ablation
import compare_llama_cpp as compare
import hook_engines
import hooks as hook_costs
import measures
import memory_peak
import quality
import random_gguf
import random_packed
import reproduce
import serve_engine
import text_speed
import workers


@pytest.fixture
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> float:
    """Measuring it takes a second and gigabytes."""
    monkeypatch.setattr(bench, "read_bandwidth", lambda threads: 1e10)
    return 1e10


# gemloupe bench


def test_cases_are_all_combinations_prefill_first() -> None:
    found = bench.cases([512, 8], [128], [0, 64], [1])
    assert [case.name for case in found] == [
        "pp512", "pp8", "tg128", "pp512 d64", "pp8 d64", "tg128 d64",
    ]  # fmt: skip
    assert bench.cases([0], [4], [0], [2]) == [Case("tg", 4, 0, 2)]
    assert Case("tg", 4, 7, 2).name == "tg4 d7 x2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [0], [0], [1]), "expected something to measure"),
        (([-1], [4], [0], [1]), "-p is -1"),
        (([1], [4], [-2], [1]), "-d is -2"),
        (([1], [4], [0], [0]), "-b is 0; expected 1 or more"),
    ],
)
def test_impossible_cases_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.cases(*arguments)


def test_spread_is_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, 4)
    assert Spread.of([3.0, 1.0, 2.0]).text(1) == "2.0 (1.0–3.0)"
    assert Spread.of([3.0]).text(1) == "3.0"
    with pytest.raises(ValueError, match="no samples"):
        Spread.of([])


class Recording:
    """A session that writes down what it is asked to do."""

    log: list[tuple[Any, ...]] = []

    def __init__(self, model: Any, chunk: int) -> None:
        self._session = SESSION(model, chunk)
        self.log.append(("session",))

    def submit(self, request: Any) -> int:
        self.log.append(("submit", len(request.ids), request.cache.length, request.max_new_tokens))
        return self._session.submit(request)

    def step(self) -> Any:
        results = self._session.step()
        self.log.append(("step", len(results)))
        return results

    @property
    def active(self) -> int:
        return self._session.active


SESSION = _core.Session


def test_a_case_reads_and_decodes_as_many_tokens_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = bench.Runner(gl.load("demo:edge"))
    monkeypatch.setattr(_core, "Session", Recording)
    monkeypatch.setattr(Recording, "log", [])
    runner.seconds(Case("tg", 4, depth=3, batch=2))
    filled = [("session",), ("submit", 3, 0, 1), ("step", 1)]
    rows = [("session",), ("submit", 1, 3, 5), ("submit", 1, 3, 5), ("step", 1), ("step", 1)]
    assert Recording.log == filled + rows + [("step", 2)] * 4
    Recording.log.clear()
    runner.seconds(Case("pp", 6, depth=3))  # The depth is there already.
    assert Recording.log == [("session",), ("submit", 6, 3, 1), ("step", 1)]


def test_json_lines_hold_everything_that_a_figure_needs(
    capsys: pytest.CaptureFixture[str], bandwidth: float
) -> None:
    command = "bench demo:moe -p 6 -n 3 -d 0,5 -b 1,2 -r 2 -t 1 --json"
    assert cli.main(command.split()) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["test"] for r in records] == [
        "pp6", "tg3", "pp6 x2", "tg3 x2", "pp6 d5", "tg3 d5", "pp6 d5 x2", "tg3 d5 x2",
    ]  # fmt: skip
    for entry in records:
        assert len(entry["samples"]) == 2
        assert entry["least"] <= entry["tokens_per_second"] <= entry["greatest"]
        assert entry["threads"] == 1 and entry["isa"] == _core.isa()
        assert entry["dtype"] == "bfloat16" and entry["kv_dtype"] == "float16"
        assert entry["bandwidth"] == bandwidth and entry["peak_rss"] > 1 << 20
        assert {"cpu", "gemloupe", "commit", "onednn", "date", "load_seconds"} < entry.keys()
        if entry["kind"] == "tg":
            expected = entry["tokens_per_second"] * entry["bytes_per_token"] / bandwidth
            assert entry["share_of_bandwidth"] == pytest.approx(expected)
        else:
            assert "bytes_per_token" not in entry
    one, two = (r["bytes_per_token"] for r in records if r["test"] in ("tg3", "tg3 x2"))
    assert one / 2 < two < one  # Rows share most weights, not the experts and the cache.


def test_a_terminal_gets_a_table(capsys: pytest.CaptureFixture[str], bandwidth: float) -> None:
    assert cli.main("bench demo:edge -p 4 -n 2 -r 1 --dtype int4".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("demo:edge, int4, KV float16, ")
    assert [line.split()[0] for line in lines[-3:]] == ["test", "pp4", "tg2"]
    assert lines[-2].endswith("-") and lines[-1].endswith(" %")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-p x", "'x' is no list of numbers"),
        ("-r 0", "-r is 0; expected 1 or more"),
        ("-p 0 -n 0", "expected something to measure"),
        ("--dtype int5", "dtype is 'int5'"),
        ("-p 999999999", "pp999999999 needs a context of 1000000000 tokens; expected at most"),
    ],
)
def test_misuse_is_one_line(
    options: str, message: str, capsys: pytest.CaptureFixture[str], bandwidth: float
) -> None:
    try:
        code = cli.main(["bench", "demo:edge", *options.split()])
    except SystemExit as exit:
        code = int(exit.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_bandwidth_that_can_not_be_measured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="read bandwidth could not be measured: exit code 1"):
        bench.read_bandwidth(1)


def test_bytes_of_keys_and_values_are_those_of_the_specification() -> None:
    e2b, large = VARIANTS["E2B"].config.text, VARIANTS["31B"].config.text
    # 28 sliding layers of 256, 7 full ones of 512, one head each; keys and values, 2 bytes.
    assert bench.kv_bytes_read(e2b, 1, "float16") == 2 * 2 * (28 * 256 + 7 * 512)
    assert bench.kv_bytes_read(e2b, 600, "float32") == 4 * 2 * (28 * 512 * 256 + 7 * 600 * 512)
    # 50 sliding layers with 16 heads; 10 full ones with 4, values and the 128 rotated dims of keys.
    sliding, full = 50 * 16 * 2 * 256, 10 * 4
    assert bench.kv_bytes_read(large, 1, "bfloat16") == 2 * (sliding + full * (512 + 128))
    separate = bench.kv_bytes_read(large, 2000, "bfloat16", separate_keys=True)
    assert separate == 2 * (1024 * sliding + 2000 * full * 2 * 512)
    # int8: a float32 scale for keys and one for values of each head.
    assert bench.kv_bytes_read(e2b, 1, "int8") == 2 * (28 * 256 + 7 * 512) + 35 * 8


def test_bytes_of_weights_count_the_experts_that_rows_use() -> None:
    text = VARIANTS["26B-A4B"].config.text  # 8 of 128 experts
    tensors = [
        ("layers.0.experts.down_proj", (128, 2816, 704), 12800),
        ("layers.0.mlp.up_proj.weight", (2112, 2816), 50),
        ("embed_tokens_per_layer.weight", (262144, 4), 1 << 30),
    ]
    assert bench.weight_bytes_per_pass(text, tensors) == pytest.approx(800 + 50)
    both = 12800 * (1 - (15 / 16) ** 2)
    assert bench.weight_bytes_per_pass(text, tensors, 2) == pytest.approx(both + 50)


# Measures of quality


def test_divergences_have_their_textbook_values() -> None:
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]]) + 7
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert measures.kl_divergence(p, q) == pytest.approx([expected, 0.0])
    assert measures.same_top(p, q).tolist() == [False, True]
    middle = [0.375, 0.625]
    js = 0.5 * sum(a * math.log(a / m) for a, m in zip([0.5, 0.5], middle, strict=True))
    js += 0.5 * sum(a * math.log(a / m) for a, m in zip([0.25, 0.75], middle, strict=True))
    assert measures.js_divergence(np.exp(p), np.exp(q - 7)) == pytest.approx([js, 0.0])
    far = measures.js_divergence(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
    assert far == pytest.approx([math.log(2)])


def test_losses_are_those_of_the_next_tokens() -> None:
    logits = np.log([[0.2, 0.8], [0.5, 0.5], [0.1, 0.9]])
    assert measures.losses(logits, [1, 0, 1]) == pytest.approx([-math.log(0.2), -math.log(0.5)])


def test_relative_errors_and_expert_sets_are_by_row() -> None:
    a = np.array([[3.0, 4.0], [1.0, 0.0]])
    assert measures.relative_error(a, a + [[0, 5], [0, 0]]) == pytest.approx([1.0, 0.0])
    chosen = np.array([[1, 2], [3, 4], [5, 6]])
    assert measures.same_set(chosen, np.array([[2, 1], [3, 5], [5, 6]])).tolist() == [1, 0, 1]


def test_rank_correlation_shares_ranks_of_ties() -> None:
    assert measures.ranks([10, 20, 10, 30]).tolist() == [1.5, 3.0, 1.5, 4.0]
    assert measures.rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert measures.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert measures.rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert math.isnan(measures.rank_correlation([1, 2], [5, 5]))
    with pytest.raises(ValueError, match="got 1 and 2 values"):
        measures.rank_correlation([1], [1, 2])


def test_bootstrap_draws_whole_texts() -> None:
    same = [np.full(3, 0.25), np.full(50, 0.25)]
    assert measures.mean_interval(same) == pytest.approx((0.25, 0.25))
    # Either text alone gives 0 or 1; tokens drawn one by one would hardly leave 0.5.
    low, high = measures.mean_interval([np.zeros(100), np.ones(100)])
    assert (low, high) == (0.0, 1.0)
    assert all(map(math.isnan, measures.bootstrap(2, lambda i: math.nan, samples=5)))
    with pytest.raises(ValueError, match="nothing to draw from"):
        measures.bootstrap(0, lambda i: 0.0)


def test_q4_0_rounding_is_llama_cpps() -> None:
    values = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    values[3, :32] = 0
    values[5, 32:64] *= 1e-6
    kind = gguf.GGMLQuantizationType.Q4_0
    expected = gguf.dequantize(gguf.quantize(values, kind), kind)
    assert np.array_equal(measures.round_q4_0(values), expected)
    with pytest.raises(ValueError, match="33 elements; expected a multiple of 32"):
        measures.round_q4_0(np.zeros((2, 33), np.float32))


# quality.py


@pytest.fixture(scope="module")
def moe_quality(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quality")
    arguments = ["demo:moe", "--texts", "3", "--ablations", "2", "--ablation-texts", "1"]
    settings = ["int8", "int4", "q4_0 rounding", "float32, KV float16"]
    report = quality.evaluate(
        "demo:moe", quality.parse([*arguments, "--folder", str(folder), "--settings", *settings])
    )
    assert not list(folder.iterdir())
    return report


def test_float32_is_itself_and_fewer_bits_are_further_away(moe_quality: dict[str, Any]) -> None:
    settings = moe_quality["settings"]
    exact = settings["float32"]
    assert exact["kl_max"] == 0 and exact["top1"] == 1 and exact["same_experts"] == [1.0] * 6
    assert exact["heads_rank_correlation"] == pytest.approx(1)
    errors = [settings[n]["resid_error_mean"] for n in ("float32, KV float16", "int8", "int4")]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert settings["int8"]["kl_mean"] < settings["int4"]["kl_mean"]
    assert settings["int4"]["kl_p50"] <= settings["int4"]["kl_p99"] <= settings["int4"]["kl_max"]
    # Most of a question's words can not be predicted; only answers are scored.
    assert moe_quality["scored"] < moe_quality["tokens"] and exact["perplexity"] < 10
    ablated = moe_quality["ablated"]
    assert len(ablated["heads"]) == len(ablated["experts"]) == 2


def test_goals_compare_int4_with_q4_0_rounding(moe_quality: dict[str, Any]) -> None:
    goals = {goal["goal"]: goal for goal in moe_quality["goals"]}
    top = goals["int8 top-1 ≥ 99 %"]
    assert top["met"] == (top["value"] >= 0.99)
    kl = goals["mean KL: int4 ≤ q4_0 rounding"]
    assert kl["value"] == [moe_quality["settings"][n]["kl_mean"] for n in ("int4", "q4_0 rounding")]
    assert kl["met"] == (kl["value"][0] <= kl["value"][1])
    assert "same experts: int4 ≥ q4_0 rounding, within 95 %" in goals
    text = quality.report_text(moe_quality)
    assert "| q4_0 rounding |" in text and "by layer with experts" in text


def test_worse_figures_miss_a_goal() -> None:
    def figures(kl: float, top: bool) -> quality.Figures:
        texts = [np.full(4, kl) for _ in range(5)]
        tops = [np.full(4, top) for _ in range(5)]
        return quality.Figures(texts, tops, texts, [t[None] for t in texts], [], [])

    goals = quality.compared(("a", "b"), figures(0, True), figures(2, False), figures(1, True))
    assert [goal["met"] for goal in goals] == [False] * 4
    goals = quality.compared(("a", "b"), figures(0, True), figures(1, True), figures(1, True))
    assert [goal["met"] for goal in goals] == [True] * 4


def test_ablations_take_one_head_or_expert_away() -> None:
    model = gl.load("demo:moe")
    heads, experts = quality.ablations(model, 3, seed=0)
    assert len(set(heads)) == len(set(experts)) == 3
    size = model.config.text.layers[1].head_dim
    name = "layers.1.self_attn.o_proj.weight"
    ones = np.ones((4, 4 * size), np.float32)
    changed = quality.without_head(model, 1, 2)(name, ones.copy())
    assert np.flatnonzero(changed[0] == 0).tolist() == list(range(2 * size, 3 * size))
    assert (quality.without_head(model, 1, 2)("layers.0." + name[9:], ones) == 1).all()
    changed = quality.without_expert(0, 2)("layers.0.experts.down_proj", np.ones((4, 3, 2)))
    assert changed.sum((1, 2)).tolist() == [6, 6, 0, 6]


def test_q4_0_is_left_out_where_rows_have_no_whole_groups(tiny: Callable, tmp_path: Path) -> None:
    source = str(tiny("31b", style="released")[1])
    options = ["--texts", "1", "--length", "8", "--ablations", "0", "--folder", str(tmp_path)]
    report = quality.evaluate(source, quality.parse([source, *options, "--settings", "int4",
                                                     "q4_0 rounding"]))  # fmt: skip
    assert list(report["settings"]) == ["float32", "int4"] and not report["goals"]
    assert "Q4_0 was left out" in report["notes"][0]


# The programs that start engines


def test_engines_are_fed_the_given_ids() -> None:
    server = serve_engine.Server()
    loaded = server.answer(
        {"op": "load", "engine": "gemloupe", "path": "demo:dense", "threads": 1, "all_rows": True}
    )
    assert loaded["seconds"] > 0 and loaded["versions"]["gemloupe"] == gl.__version__
    server.answer({"op": "context", "separate_keys": True})
    assert server.answer({"op": "prefill", "ids": [2, 5, 6]})["seconds"] > 0
    assert len(server.answer({"op": "decode", "ids": [7, 8]})["seconds"]) == 2
    assert server._engine._cache.tokens.tolist() == [2, 5, 6, 7, 8]
    server.answer({"op": "prefill", "ids": [2]})
    assert server._engine._cache.length == 1
    memory = server.answer({"op": "memory"})
    assert memory["VmHWM"] >= memory["RssAnon"] > 0 and memory["huge_pages"] >= 0
    with pytest.raises(ValueError, match="op is 'run'"):
        server.answer({"op": "run"})


def test_a_worker_that_fails_names_its_engine() -> None:
    load = {"engine": "gemloupe", "path": "/nowhere", "threads": 1}
    with workers.Worker("ours", sys.executable, load) as worker:
        with pytest.raises(RuntimeError, match="ours: load failed: FileNotFoundError: .*/nowhere"):
            worker.load()
    with workers.Worker("theirs", "/bin/false", load) as worker:
        with pytest.raises(RuntimeError, match="theirs: the process ended with 1 during load"):
            worker.load()


def test_a_measurement_is_repeated_while_others_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeWorker:
        def cpu_seconds(self) -> float:
            return 0.0

    times = iter([0.0, 1.0, 1.0, 1.05])  # All CPUs' seconds before and after each measurement.
    clock = iter([0.0, 2.0, 2.0, 4.0])
    monkeypatch.setattr(workers, "busy_seconds", lambda: next(times))
    monkeypatch.setattr(workers.time, "perf_counter", lambda: next(clock))
    results = iter("ab")
    found, others = workers.undisturbed(FakeWorker(), lambda: next(results))
    assert found == "b" and others == pytest.approx(0.025)
    monkeypatch.undo()
    begin = workers.busy_seconds()
    sum(range(3_000_000))
    assert workers.busy_seconds() > begin


def test_every_second_round_runs_backwards() -> None:
    assert [workers.in_turns("abc", number) for number in range(3)] == [
        ["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"],
    ]  # fmt: skip
    assert workers.ratio([2.0, 4.0, 90.0], [2.0]) == 2.0 and workers.ratio([], [1.0]) is None
    assert workers.random_ids(4, 1000, [1, 2]) == workers.random_ids(4, 1000, [1, 2])


def test_llama_cpp_gets_its_fastest_settings() -> None:
    a, b = {"flash_attn": 0}, {"flash_attn": 1}
    assert compare.fastest([(a, 100, 5.0), (b, 50, 9.0)]) == {"prefill": a, "decode": b}
    # Two contexts only where they are worth it.
    assert compare.fastest([(a, 100, 5.0), (b, 99, 9.0)]) == {"prefill": b, "decode": b}
    assert compare.fastest([(a, 100, 8.9), (b, 50, 9.0)]) == {"prefill": a, "decode": a}
    assert {"flash_attn": 1, "n_ubatch": 64, "threads": 4} in compare.settings(8, 128)


def test_repacking_is_left_out_only_where_it_is_clearly_slower() -> None:
    assert compare.contenders([(100.0, 5.0), (50.0, 4.0)]) == {0}
    assert compare.contenders([(100.0, 5.0), (50.0, 4.6)]) == {0, 1}
    assert compare.contenders([(91.0, 1.0), (100.0, 5.0)]) == {0, 1}


def test_peaks_of_onednn_are_read_from_the_native_benchmark() -> None:
    text = (
        "Xeon, 2 thread(s)\noneDNN u8s8  512 rows    890.5 Gop/s\noneDNN f32   512 rows 255.0 Gop/s"
    )
    assert compare.parse_roofline(text) == {"u8s8": 890.5e9, "f32": 255e9}


def test_features_of_llama_cpp_are_those_that_are_there() -> None:
    info = "CPU : SSE3 = 1 | AMX_INT8 = 0 | REPACK = 1 | "
    assert compare.built_with(info) == "built with SSE3 REPACK"


def line(name: str, engine: str, rates: list[float]) -> compare.Line:
    return compare.Line(
        name, "file", "python", {"engine": engine}, {}, [2.0 / rates[0]], [10 * r for r in rates],
        rates, [0.0], [1e10 for _ in rates], [1 << 30], 1e9,
    )  # fmt: skip


def test_ratios_are_against_the_fastest_peer() -> None:
    peers = [line("slow", "llama.cpp", [1.0]), line("fast", "llama.cpp", [2.0, 3.0, 4.0])]
    ours = line("ours", "gemloupe", [6.0])
    found = compare.against_peers(ours, peers)
    assert found == pytest.approx({"prefill": 2, "decode": 2, "peak_rss": 1, "load": 1 / 3})
    report = {
        "variant": "E2B", "layers": 3, "vocab": None, **bench.environment(1), "gguf_bytes": 10,
        "packed_bytes": 9, "prompt": 8, "new": 2, "rounds": 3, "slices": 1,
        "bandwidths": [1e10], "onednn_peaks": {"f32": 1e9}, "busy_cpus": [0.0],
        "operations_per_token": 1e9, "notes": ["a note"],
        "lines": [vars(entry) for entry in [*peers, ours]], "ratios": {"ours": found},
    }  # fmt: skip
    assert compare.summary_row(report) == "| E2B | 30.00 | 60.00 (2.00x) | 3.00 | 6.00 (2.00x) |"
    text = compare.report_text(report)
    assert "cut to 3 layers" in text and "decode 2.00x" in text and "60 %" in text


def test_random_packed_checkpoints_load_and_stay_finite(tmp_path: Path) -> None:
    folder = tmp_path / "e2b"
    random_packed.write_packed("E2B", folder, layers=4, vocab=512)
    assert [path.name for path in tmp_path.iterdir()] == ["e2b"]
    model = gl.load(folder)
    assert model.dtype == "int4" and model.core.copied_bytes == 0
    info = model.weights.info("layers.0.mlp.up_proj.weight")
    assert info.dtype == "int4" and info.shape == (6144, 1536)
    assert model.weights.info("embed_tokens.weight").dtype == "int6"
    run = model.run(list(range(2, 30)), logits="all", capture="layers.*.resid_post")
    assert all(np.isfinite(run[name]).all() and run[name].std() > 0.1 for name in run.captured)
    assert np.isfinite(run.logits).all() and run.logits.std() > 0.1
    with pytest.raises(ValueError, match="exists; give another name"):
        random_packed.write_packed("E2B", folder)
    with pytest.raises(ValueError, match="multiple of 16"):
        random_packed.write_packed("E2B", tmp_path / "odd", layers=4, vocab=513)
    assert [path.name for path in tmp_path.iterdir()] == ["e2b"]


@pytest.mark.parametrize("kind", ["packed", "gguf"])
def test_the_estimate_is_within_5_percent_of_a_process_peak(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.gguf" if kind == "gguf" else "x")
    write = random_gguf.write_gguf if kind == "gguf" else random_packed.write_packed
    write("E2B", path, layers=8, vocab=8192)
    report = tmp_path / "report.json"
    memory_peak.main([f"E2B={path}", "--context", "1024", "--json", str(report)])
    (found,) = json.loads(report.read_text())["models"]
    assert found["estimate_met"], f"{found['estimate']} bytes, {found['peak_rss']} measured"
    parts = found["estimate_parts"]
    assert parts["process"] > 0.05 * found["peak_rss"]  # Leaving it out would be noticed.


def test_ablation_lines_fit_the_model() -> None:
    names = {
        demo: [entry.name for entry in ablation.choose_lines(f"demo:{demo}", 2)]
        for demo in ("edge", "dense", "moe")
    }
    assert "all rows in layers that share keys" in names["edge"]
    assert "keys stored beside values" in names["dense"]
    assert all(found[0] == "base" and "invariant" in found for found in names.values())
    assert "float32 activations" not in names["edge"]  # Its file is not quantised.
    assert "1 thread" not in [entry.name for entry in ablation.choose_lines("demo:moe", 1)]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (memory_peak, ["E3B"]),
        (memory_peak, ["E2B"]),
        (memory_peak, ["E2B=x", "--context", "9"]),
        (compare, ["E2B", "--rounds", "0"]),
        (ablation, ["demo:moe", "--prompt", "1"]),
        (ablation, ["demo:moe", "--cpu-seconds", "--threads", "2"]),
        (quality, ["--texts", "0"]),
        (reproduce, ["--checkpoint", "x", "--length", "1"]),
        (reproduce, []),
    ],
)
def test_programs_refuse_what_they_can_not_measure(program: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        program.parse(arguments)
    assert exit.value.code == 2


def test_quantised_weights_count_with_their_bits() -> None:
    checkpoint = gl.load("demo:moe").checkpoint
    sizes = {
        dtype: text_speed.bytes_per_token(text_speed.Line("gemloupe", dtype), checkpoint, 8, 2)
        for dtype in ("bfloat16", "int8", "int4")
    }
    assert sizes["int4"] < sizes["int8"] < sizes["bfloat16"]
    peer = text_speed.Line("transformers", "float32")
    assert text_speed.bytes_per_token(peer, checkpoint, 8, 2) > 1.9 * sizes["bfloat16"]


def test_hashes_and_versions_are_printed_with_results(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert reproduce.file_hashes([tmp_path / "a"]) == {
        "a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
    assert reproduce.versions()["numpy"] == np.__version__


def test_fidelity_with_transformers_is_close(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = gl.load("demo:edge").checkpoint
    report = reproduce.fidelity(checkpoint, "demo:edge", [[2, 300, 301, 302, 303]])
    assert report["dtype"] == "float32" and report["top1"] == 1.0
    assert report["kl_max"] < 1e-9 and max(report["resid_error"]) < 1e-5
    assert "top-1 | 100.00 %" in reproduce.fidelity_text(report)


# hooks.py


def hook_line(name: str, seconds: list[float], is_peer: bool) -> hook_costs.Line:
    dtype = name.split()[-1]
    found = hook_costs.Line(name, dtype, {}, is_peer)
    found.results["a"] = [{"seconds": s, "cpu": 2 * s, "peak_rss": 1 << 30} for s in seconds]
    return found


def test_hooks_are_timed_against_the_fastest_peer_of_each_task() -> None:
    ours = hook_line("gemloupe float32", [2.0], False)
    peers = [hook_line("slow float32", [9.0, 9.0], True), hook_line("fast float32", [5.0], True)]
    peers[0].failed["a"] = "slow: residuals failed"
    found = hook_costs.against_peers([ours, *peers], "a")
    assert found == {"gemloupe float32": (2.5, "fast float32")}
    assert hook_costs.against_peers([ours], "a") == {}
    sizes = {"prompts": 8, "length": 256}
    table = hook_costs.task_table({"sizes": sizes}, [ours, *peers], "a")
    assert "all resid_post of 8 x 256 tokens" in table
    assert "| gemloupe float32 | 2.00 | 4.00 | 1.00 | 2.5x | 1.6x: met |" in table
    assert hook_costs.notes(peers, ["a"]) == ["slow float32, a: slow: residuals failed"]


def test_a_sampled_grid_is_scaled_to_all_of_its_cells() -> None:
    assert hook_costs.scaled({"seconds": 3.0}) == 3.0
    sampled = {"seconds": 3.0, "before": 1.0, "each": [0.5, 1.5], "all_cells": 100}
    assert hook_costs.scaled(sampled) == 101.0
    assert hook_costs.scaled({**sampled, "cpu": 6.0}, "cpu") == 202.0
    cells = hook_costs.sample_cells(35, 24, 12)
    assert len({tuple(cell) for cell in cells}) == 12
    assert {layer // 12 for layer, _ in cells} == {0, 1, 2}
    assert hook_costs.sample_cells(2, 2, 9) == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_costs_of_hooks_are_held_against_their_goals() -> None:
    pairs = [[1.0, 1.02], [1.0, 1.04], [2.0, 2.02]]
    row = hook_costs.cost_row("int8", "capture", pairs, 10)
    assert row[-2:] == ["+2.0 %", "≤ 3 %: met"]
    assert hook_costs.cost_row("int8", "trace", [[1.0, 1.05]], 10)[-1] == "≤ 2 %: missed"
    row = hook_costs.cost_row("int8", "function", [[0.010, 0.0102]], 10)
    assert row[-2:] == ["20 µs each", "≤ 50 µs: met"]


@pytest.mark.parametrize("model", ["demo:edge", "demo:moe"])
def test_hooks_measures_every_task_and_cost_of_gemloupe(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    options = ["--quick", "--dtype", "float32", "--threads", "1", "--json", str(report)]
    assert hook_costs.main([model, *options]) == 0
    found = json.loads(report.read_text())
    tasks = ["a", "b", "c", "d", "e"] if model == "demo:moe" else ["a", "b", "c", "d"]
    [ours] = found["lines"]
    assert list(ours["results"]) == tasks and not ours["failed"]
    assert all(result["peak_rss"] > 0 for [result] in ours["results"].values())
    traced = ["trace"] if model == "demo:moe" else []
    assert list(found["costs"]["float32"]) == ["capture", "function", *traced]
    assert "gemloupe float32, c: 4 tokens" in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**found, "tasks": ["a"], "costs": {}}))
    merged, [line] = hook_costs.merged([report, other])
    assert [len(line.results[task]) for task in tasks] == [2 for _ in tasks]
    assert merged["tasks"] == tasks and merged["costs"] == found["costs"] and merged["rounds"] == 2
    other.write_text(json.dumps({**found, "threads": 64}))
    with pytest.raises(ValueError, match="other.json: threads is 64; expected 1, as in"):
        hook_costs.merged([report, other])


def test_a_peer_that_cannot_run_is_named_in_the_notes(tmp_path: Path) -> None:
    arguments = hook_costs.parse(
        ["demo:edge", "--quick", "--dtype", "float32", "--peers", "sdpa", "--costs", "--tasks", "a",
         "--peer-python", "/bin/false"]
    )  # fmt: skip
    report, lines = hook_costs.run(arguments)
    text = hook_costs.report_text(report, lines)
    assert (
        "transformers sdpa float32, a: transformers sdpa float32: the process ended with 1" in text
    )
    assert "| transformers sdpa float32 | failed |" in text


def test_task_e_needs_a_model_with_experts() -> None:
    with pytest.raises(ValueError, match="task e needs a model with experts"):
        hook_costs.run(hook_costs.parse(["demo:edge", "--quick", "--tasks", "e"]))


def test_every_engine_knows_every_task() -> None:
    for engine in hook_engines.ENGINES.values():
        for op in ("residuals", "grid", "steer", "dump", "experts"):
            assert callable(getattr(engine, op))
