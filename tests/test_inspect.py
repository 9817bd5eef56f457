"""Sizes and the report on them; the expected figures are those of the published models."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from gemloupe import doctor, inspect, sizes
from gemloupe.checkpoint import expected_text_tensors
from gemloupe.inspect import describe, estimate
from gemloupe.variants import VARIANTS as RELEASED
from snapshot_texts import assert_is_snapshot
from tiny_models import VARIANTS, text_model

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("E2B", 5_104_297_504),
        ("E4B", 7_941_100_832),
        ("12B", 11_959_730_176),
        ("26B-A4B", 25_805_933_872),
        ("31B", 31_273_086_512),
    ],
)
def test_released_models_have_their_published_parameter_counts(name: str, total: int) -> None:
    assert describe(name).parameters.total == total


@pytest.mark.parametrize(
    ("name", "body", "embedding", "table", "experts", "active"),
    [
        ("E2B", 1877, 402.65, 2348.8, 0, 2280),
        ("E4B", 3973, 671.09, 2818.6, 0, 4644),
        ("12B", 10_901, 1006.6, 0, 0, 11_907),
        ("26B-A4B", 1657, 738.2, 0, 22_838, 3823),
        ("31B", 29_288, 1409.3, 0, 0, 30_697),
    ],
)
def test_parameters_by_part_in_millions(
    name: str, body: float, embedding: float, table: float, experts: float, active: float
) -> None:
    counts = describe(name).parameters
    found = (counts.text_body, counts.embedding, counts.per_layer_table, counts.experts)
    assert [count / 1e6 for count in found] == pytest.approx(
        [body, embedding, table, experts], rel=5e-4
    )
    assert counts.active / 1e6 == pytest.approx(active, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "sliding", "full", "windowed_mib", "all_kept_gib"),
    [
        ("E2B", 12_288, 6_144, 774, 2.25),
        ("E4B", 40_960, 16_384, 2068, 7),
        ("12B", 327_680, 16_384, 4416, 84),
        ("26B-A4B", 204_800, 20_480, 5320, 55),
        ("31B", 819_200, 81_920, 21_280, 220),
    ],
)
def test_kv_cache_sizes_of_the_released_models(
    name: str, sliding: int, full: int, windowed_mib: int, all_kept_gib: float
) -> None:
    report = describe(name)
    assert report.kv_bytes_per_token == (sliding, full)
    assert report.kv_bytes_full_context == windowed_mib * MIB
    context = report.config.text.max_position_embeddings
    assert (sliding + full) * context == all_kept_gib * 1024 * MIB


@pytest.mark.parametrize("name", RELEASED)
def test_reports_of_the_released_models(name: str) -> None:
    assert_is_snapshot("inspect", name, str(describe(name)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_a_checkpoint_are_those_that_transformers_counts(
    tiny: Callable, variant: str
) -> None:
    model, folder = tiny(variant, towers="tiny")
    counts = describe(folder).parameters
    assert counts.text == sum(p.numel() for p in text_model(model).parameters())
    assert counts.total == sum(p.numel() for p in model.parameters())
    from_config = sizes.count_parameters(describe(folder).config)
    assert from_config == counts


def test_layer_groups_hold_every_layer_once(tiny: Callable) -> None:
    report = describe(tiny("e2b")[1])
    layers = sorted(index for group in report.groups for index in group.layers)
    assert layers == list(range(report.config.text.num_hidden_layers))
    assert [group.shares for group in report.groups] == [False, False, True, True]


def test_a_report_names_files_and_unused_tensors(tiny: Callable) -> None:
    report = describe(tiny("e2b", style="released")[1])
    assert "1 file" in report.stored
    assert "(15 of them never used)" in report.stored
    assert report.stored in str(report)


def test_a_folder_with_a_config_only_is_described(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED["31B"].raw))
    report = describe(tmp_path)
    assert report.checkpoint is None
    assert report.parameters == describe("31B").parameters


def test_a_released_hub_id_needs_no_network() -> None:
    assert describe("google/gemma-4-31b-IT").parameters == describe("31B").parameters


def test_estimate_adds_process_weights_cache_and_scratch() -> None:
    found = estimate("E2B", "bfloat16", context=1000, kv_dtype="float16", chunk=64)
    shapes = expected_text_tensors(RELEASED["E2B"].config.text)
    vectors = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    counts = describe("E2B").parameters
    matrices = sum(math.prod(shape) for shape in shapes.values()) - vectors
    # Matrices as stored, vectors in float32; of the table only rows are read.
    assert found.weights == 2 * (matrices - counts.per_layer_table) + 4 * vectors
    full_blocks, sliding_positions = 16, 640  # 1000 -> 16 blocks of 64; 511 + 64 + 64 -> 640.
    per_token = describe("E2B").kv_bytes_per_token
    assert found.kv_cache == sliding_positions * per_token[0] + full_blocks * 64 * per_token[1]
    assert found.converting == 0
    assert int(found) == found.process + found.weights + found.kv_cache + found.scratch


def test_float32_reads_bfloat16_files_as_they_are_with_a_float32_cache() -> None:
    bfloat16 = estimate("E2B", "bfloat16")
    float32 = estimate("E2B", "float32")
    assert float32.weights == bfloat16.weights
    assert (float32.kv_dtype, bfloat16.kv_dtype) == ("float32", "float16")
    assert float32.kv_cache == 2 * bfloat16.kv_cache


def test_a_float32_checkpoint_is_mapped_or_rounded(tiny: Callable) -> None:
    folder = tiny("31b")[1]
    as_stored, rounded = estimate(folder, context=64), estimate(folder, "bfloat16", context=64)
    assert (as_stored.dtype, as_stored.kv_dtype) == ("float32", "float16")
    assert estimate(folder, "float32", context=64).kv_dtype == "float32"
    stored = describe(folder).checkpoint.text_tensors.values()
    assert as_stored.weights == sum(tensor.nbytes for tensor in stored)
    matrices = sum(tensor.nbytes for tensor in stored if len(tensor.shape) > 1)
    part = max(tensor.nbytes for tensor in stored)  # Of the source, beside its converted form.
    assert rounded.weights == as_stored.weights - matrices // 2
    assert (rounded.converting, as_stored.converting) == (part, 0)


def test_bytes_per_decoded_token_are_active_weights_and_what_is_attended() -> None:
    config = RELEASED["31B"].config.text
    counts = describe("31B").parameters
    found = sizes.bytes_per_decoded_token(counts, config, 10_000, 16, 2)
    attended = 1024 * 819_200 + 10_000 * 81_920 * 5 // 8  # Derived keys: 640 of 1024 values.
    assert found == 2 * counts.active + attended


def test_index_ranges_are_short() -> None:
    assert inspect._ranges([0, 1, 2, 3, 5, 6, 10]) == "0-3, 5-6, 10"
    assert inspect._ranges(range(0, 40, 2)) == "0, 2, 4, …, 38"


MACHINE = doctor.Machine(
    cpu="Some CPU @ 2.80GHz",
    isa="avx512_vnni",
    detected_isa="avx512_vnni",
    features=("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni"),
    threads=8,
    cpus=8,
    memory=48 << 30,
    bandwidth=23.0,
    huge_pages="madvise",
    versions={"gemloupe": "0.1.0", "oneDNN": "3.2.0"},
)


def test_doctor_says_what_fits_and_how_fast() -> None:
    assert_is_snapshot("inspect", "doctor", doctor.report(MACHINE))


def test_doctor_says_what_to_do_on_a_poor_machine() -> None:
    poor = dataclasses.replace(
        MACHINE, isa="portable", features=(), threads=2, memory=1 << 30, huge_pages="never"
    )
    text = doctor.report(poor)
    assert "unset GEMLOUPE_ISA" in text
    assert "Only 2 of 8 CPUs are used" in text
    assert "Huge pages are off: echo madvise" in text
    assert "No released model fits: start with a demo model." in text
    assert "tok/s" not in text.split("decoding")[1]


def test_doctor_examines_this_machine() -> None:
    text = doctor.report()
    assert "GB/s, measured" in text
    assert "oneDNN" in text
