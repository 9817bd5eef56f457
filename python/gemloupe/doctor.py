"""What this machine can do with the family (`gemloupe doctor`): CPU, memory, and what fits."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gemloupe import sizes
from gemloupe.errors import format_bytes
from gemloupe.variants import VARIANTS

_DTYPES = ("float32", "bfloat16", "int8", "int4")
_CONTEXTS = (4096, 32_768)  # And each model's own limit.
# What the kernels or oneDNN make use of, as /proc/cpuinfo spells it.
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16",
    "amx_int8",
)  # fmt: skip
_PACKAGES = ("numpy", "tokenizers", "jinja2", "huggingface_hub")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Machine:
    """What `examine` found."""

    cpu: str
    isa: str
    """Instruction set in use; `detected_isa` unless GEMLOUPE_ISA lowers it."""
    detected_isa: str
    features: tuple[str, ...]
    """Which of the features that matter this CPU has."""
    threads: int
    """CPUs that this process may use."""
    cpus: int
    memory: int
    """Bytes that this process could still use."""
    bandwidth: float
    """GB/s that all threads together read from memory, measured."""
    huge_pages: str
    """"always", "madvise", "never" or "unknown"."""
    versions: dict[str, str]


def examine(threads: int | None = None) -> Machine:
    """Asks the system and measures the read bandwidth, which takes about a second and 512 MiB."""
    from gemloupe import _core

    usable = _core.available_cpus()
    count = usable if threads is None else threads
    return Machine(
        cpu=_core.cpu_model(),
        isa=_core.isa(),
        detected_isa=_core.detected_isa(),
        features=_cpu_features(),
        threads=count,
        cpus=os.cpu_count() or usable,
        memory=_core.available_memory(),
        bandwidth=_core.measure_bandwidth(count),
        huge_pages=_huge_pages(),
        versions={
            "gemloupe": _core.__version__,
            "Python": platform.python_version(),
            "oneDNN": _core.onednn_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
    )


def report(machine: Machine | None = None) -> str:
    """Returns the text of `gemloupe doctor`, of this machine unless another is given."""
    machine = examine() if machine is None else machine
    return "\n\n".join([_machine(machine), _fit_table(machine), _advice(machine)])


def _machine(machine: Machine) -> str:
    isa = machine.isa
    if isa != machine.detected_isa:
        isa += f" (GEMLOUPE_ISA; the CPU has {machine.detected_isa})"
    versions = [f"{name} {version}" for name, version in machine.versions.items()]
    missing = [name for name in _FEATURES if name not in machine.features]
    rows = [
        ("CPU", machine.cpu),
        ("instruction set", isa),
        ("features", " ".join(machine.features) or "none of those that matter"),
        ("not here", " ".join(missing) or "-"),
        ("threads", f"{machine.threads} of {machine.cpus} CPUs"),
        ("free memory", format_bytes(machine.memory)),
        ("read bandwidth", f"{machine.bandwidth:.1f} GB/s, measured with these threads"),
        ("huge pages", machine.huge_pages),
        ("versions", ", ".join(versions)),
    ]
    return "This machine\n" + "\n".join(f"  {name:<17}{value}" for name, value in rows)


def _fit_table(machine: Machine) -> str:
    lines = [
        "Released models: memory needed, and tokens a second to expect when decoding",
        "  (bandwidth / bytes read for a token. The files hold bfloat16; float32 reads them so",
        "  and keeps a float32 KV cache; int8 and int4 are what gemloupe convert makes of them.",
        "  -- does not fit here.)",
        f"  {'':9}{'':9}{'4K context':>24}{'32K context':>24}{'full context':>31}",
    ]
    for name in VARIANTS:
        limit = VARIANTS[name].config.text.max_position_embeddings >> 10
        for dtype in _DTYPES:
            cells = [f"{cell:>24}" for cell in _cells(machine, name, dtype)]
            cells[-1] = f"{limit:>6}K{cells[-1]}"
            lines.append(f"  {name:<9}{dtype:<9}{''.join(cells)}")
    return "\n".join(lines)


def _cells(machine: Machine, name: str, dtype: str) -> list[str]:
    config = VARIANTS[name].config
    text = config.text
    parameters = sizes.count_parameters(config)
    bits = 16 if dtype in ("float32", "bfloat16") else sizes.decoded_weight_bits(text, dtype)
    cells = []
    for context in (*_CONTEXTS, text.max_position_embeddings):
        needed = sizes.estimate(config, dtype, context)
        read = sizes.bytes_per_decoded_token(
            parameters, text, context, bits, sizes.KV_BYTES[needed.kv_dtype]
        )
        speed = f"{machine.bandwidth * 1e9 / read:.1f} tok/s"
        if needed.total > machine.memory:
            speed = "--"
        cells.append(f"{format_bytes(needed.total)} {speed:>11}")
    return cells


def _advice(machine: Machine) -> str:
    """Says what to do: about what is slow here, and which model to start with."""
    lines = []
    if machine.isa == "portable":
        lines.append(
            "The portable kernels are in use, which are slow: "
            + (
                "unset GEMLOUPE_ISA."
                if machine.detected_isa != "portable"
                else "use a CPU with AVX2 or AVX-512."
            )
        )
    if machine.threads < machine.cpus:
        lines.append(
            f"Only {machine.threads} of {machine.cpus} CPUs are used: allow more with taskset, or "
            "in the container's CPU limit."
        )
    if machine.huge_pages == "never":
        lines.append(f"Huge pages are off: echo madvise | sudo tee {_THP}")
    fitting = {
        dtype: [
            name
            for name, variant in VARIANTS.items()
            if sizes.estimate(variant, dtype, 4096).total <= machine.memory
        ]
        for dtype in ("bfloat16", "int4")
    }
    largest = {dtype: _largest(names) for dtype, names in fitting.items() if names}
    if largest:
        found = [f"{name} in {dtype}" for dtype, name in largest.items()]
        lines.append(f"Largest model that fits at 4K: {', '.join(found)}.")
    else:
        lines.append("No released model fits: start with a demo model.")
    lines.append("Five things to try: gemloupe")
    return "\n".join(lines)


def _largest(names: Sequence[str]) -> str:
    return max(names, key=lambda name: sizes.count_parameters(VARIANTS[name].config).total)


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    try:
        match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        match = None
    flags = set(match[1].split()) if match else set()
    return tuple(name for name in _FEATURES if name in flags)


def _huge_pages() -> str:
    try:
        match = re.search(r"\[(\w+)\]", _THP.read_text())
    except OSError:
        match = None
    return match[1] if match else "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
