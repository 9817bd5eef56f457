"""The Containerfile: short, without root or secrets, and of steps that CI executes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("c", ROOT / "scripts" / "run_containerfile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["c"] = module  # Its dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def test_the_containerfile_is_short_and_serves_without_root(script: ModuleType) -> None:
    text = (ROOT / "Containerfile").read_text()
    assert len(text.splitlines()) <= 15
    steps = script.parse(text)
    names = [name for name, _ in steps]
    assert {"FROM", "RUN", "COPY", "USER", "CMD"} <= set(names)
    assert names[-1] == "CMD" and "--host 0.0.0.0" in steps[-1][1]
    last = names[::-1].index("USER")
    assert steps[-1 - last][1] not in ("root", "0") and "RUN" not in names[-1 - last :]
    assert not any(name == "ENV" and "KEY" in rest for name, rest in steps)
    assert "scripts/build_wheel.sh /wheels" in [rest for name, rest in steps if name == "RUN"]


def test_ci_takes_the_wheel_of_the_step_that_it_names() -> None:
    given = 'given=(--given "scripts/build_wheel.sh /wheels='
    assert given in (ROOT / ".ci" / "run").read_text()


def test_a_containers_context_has_neither_history_nor_builds(script: ModuleType) -> None:
    rules = script._ignored(ROOT / "Containerfile")

    def is_left_out(path: str) -> bool:
        return any(script._matches(path, rule) for rule in rules)

    assert all(map(is_left_out, (".git", "build", ".venv", "python/gemloupe/_core.x.so")))
    assert not any(map(is_left_out, ("scripts", "csrc/base", "python/gemloupe/build", "a/.github")))


def test_names_are_looked_up_in_a_root_as_on_this_machine(
    script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "hosts").symlink_to("../run/nothing")
    script._copy_name_service(tmp_path)
    assert not (tmp_path / "etc" / "hosts").is_symlink()
    assert (tmp_path / "etc" / "hosts").read_bytes() == Path("/etc/hosts").read_bytes()


def test_ci_refuses_stages_that_it_does_not_have(tmp_path: Path) -> None:
    run = ROOT / ".ci" / "run"
    done = subprocess.run([run, "style", "lint"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "no stage is called lint; expected some of: apt" in done.stderr
