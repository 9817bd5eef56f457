"""Executes a Containerfile's steps without a container engine, and asks the server that it starts.

    sudo python scripts/run_containerfile.py [--given "COMMAND=FOLDER:PATH"]

Each build stage has a root of its own: this machine's, read-only, below an empty layer in memory
that takes all writes (overlayfs, in namespaces that end with this process). What differs from an
engine: FROM is this machine's system with a fresh venv as its `python` and `pip`, and RUN uses this
machine's network; the server has one of its own. RUN, COPY, WORKDIR, ENV, USER and CMD are executed
as they are written, RUN and CMD by /bin/sh inside the stage's root. `--given` takes the result of a
RUN step from where the same command was executed before: FOLDER's files come to PATH. Then: without
a key the server must refuse to start; with one, /health and a chat must be answered.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import fnmatch
import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

SERVER = "http://127.0.0.1:11434"
_INSIDE = "GEMLOUPE_CONTAINER_INSIDE"
_PYTHON = "/opt/container-python"
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_START_SECONDS = 120


@dataclass
class Stage:
    """A root in the making, and what later steps of it begin with."""

    root: Path
    folder: str = "/"
    user: str = "root"
    env: dict[str, str] = field(default_factory=dict)
    command: str = ""


def parse(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest) of every line that is no comment."""
    lines = [line.strip() for line in text.splitlines()]
    return [
        (name.upper(), rest.strip())
        for name, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path("Containerfile"))
    parser.add_argument("--given", action="append", default=[], metavar="COMMAND=FOLDER:PATH")
    arguments = parser.parse_args()
    if _INSIDE not in os.environ:
        # All mounts and processes end with this one.
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with tempfile.TemporaryDirectory(prefix="container-") as folder:
            command = [*apart, sys.executable, *sys.argv]
            return subprocess.run(command, env={**os.environ, _INSIDE: folder}).returncode
    given = {}
    for text in arguments.given:
        command, _, places = text.rpartition("=")
        folder, _, path = places.partition(":")
        given[command] = (Path(folder), path)
    scratch = Path(os.environ[_INSIDE])
    _call("mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", str(scratch))
    stage = _build(arguments.file, scratch, given)
    _ask(stage)
    print("the server refused to start without a key, and answered with one")
    return 0


def _build(file: Path, scratch: Path, given: dict[str, tuple[Path, str]]) -> Stage:
    stages: dict[str, Stage] = {}
    stage = Stage(scratch)
    for name, rest in parse(file.read_text()):
        print(f"--- {name} {rest}", flush=True)
        if name == "FROM":
            alias = rest.partition(" AS ")[2] or str(len(stages))
            stage = stages[alias] = Stage(_new_root(scratch / alias))
        elif name == "RUN" and rest in given:
            source, path = given[rest]
            print(f"    executed before: {source} comes to {path}", flush=True)
            shutil.copytree(source, _inside(stage, path))
        elif name == "RUN":
            subprocess.run(_shell(stage, rest), check=True, stdin=subprocess.DEVNULL)
        elif name == "COPY":
            _copy(stage, stages, file, rest.split())
        elif name == "WORKDIR":
            stage.folder = os.path.join(stage.folder, rest)
            _inside(stage, stage.folder).mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            key, _, value = rest.partition("=")
            stage.env[key] = value
        elif name == "USER":
            stage.user = rest
        elif name == "CMD":
            stage.command = rest
        else:
            raise SystemExit(f"{name} is an instruction that this script does not execute")
    return stage


def _new_root(folder: Path) -> Path:
    """This machine's root below an empty layer, with a venv that stands for the image's Python."""
    upper, work, root = (folder / part for part in ("upper", "work", "root"))
    for path in (upper, work, root):
        path.mkdir(parents=True)
    layers = f"lowerdir=/,upperdir={upper},workdir={work}"
    _call("mount", "-t", "overlay", "-o", layers, "overlay", str(root))
    for path in ("dev", "proc", "sys"):
        _call("mount", "--rbind", f"/{path}", str(root / path))
    _call("mount", "-t", "tmpfs", "tmpfs", str(root / "tmp"))
    _copy_name_service(root)
    _call("chroot", str(root), sys.executable, "-m", "venv", _PYTHON)
    # An image's user may read its Python; this machine's may lie in a home.
    for parent in Path(sys.executable).resolve().parents:
        path = root / parent.relative_to("/")
        path.chmod(path.stat().st_mode | 0o011)
    return root


def _copy_name_service(root: Path) -> None:
    """Gives a root what names are looked up with: where this machine is a container, these files
    are mounts, which the root lacks; elsewhere they may be links to such.
    """
    for name in ("resolv.conf", "hosts"):
        source, target = Path("/etc", name), root / "etc" / name
        if source.is_file():
            target.unlink(missing_ok=True)
            target.write_bytes(source.read_bytes())


def _inside(stage: Stage, path: str) -> Path:
    return stage.root / os.path.join(stage.folder, path).lstrip("/")


def _shell(stage: Stage, command: str) -> list[str]:
    """What executes a command in a stage's root, as its user, with nothing of this environment
    but where pip finds packages.
    """
    home = "/root" if stage.user == "root" else f"/home/{stage.user}"
    kept = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))}
    env = {"PATH": f"{_PYTHON}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, **kept}
    env |= {"DEBIAN_FRONTEND": "noninteractive", **stage.env}
    user = ["chroot", f"--userspec={stage.user}", "--groups=", str(stage.root)]
    assigned = [f"{key}={value}" for key, value in env.items()]
    return [*user, "env", "-i", f"--chdir={stage.folder}", *assigned, "/bin/sh", "-ec", command]


def _copy(stage: Stage, stages: dict[str, Stage], file: Path, words: list[str]) -> None:
    context, ignored = file.resolve().parent, _ignored(file)
    if words[0].startswith("--from="):
        context, ignored = stages[words[0].partition("=")[2]].root, []
        words = words[1:]
    *sources, target = words
    for source in sources:

        def skip(folder: str, names: list[str]) -> list[str]:
            relative = os.path.relpath(folder, context)
            paths = {name: os.path.normpath(os.path.join(relative, name)) for name in names}
            return [n for n, path in paths.items() if any(_matches(path, p) for p in ignored)]

        begin = context / source.lstrip("/")
        shutil.copytree(begin, _inside(stage, target), ignore=skip, dirs_exist_ok=True)


def _ignored(file: Path) -> list[str]:
    rules = file.with_name(".dockerignore")
    return rules.read_text().split() if rules.is_file() else []


def _matches(path: str, rule: str) -> bool:
    """A rule names a path of the context, or with **/ before it a name in any folder."""
    if rule.startswith("**/"):
        return fnmatch.fnmatchcase(os.path.basename(path), rule[3:])
    return fnmatch.fnmatchcase(path, rule)


def _ask(stage: Stage) -> None:
    """Starts CMD in a network of its own and sends requests to it."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no network of its own")
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    print(f"--- CMD {stage.command}, without a key", flush=True)
    refused = subprocess.run(
        _shell(stage, stage.command), capture_output=True, text=True, timeout=_START_SECONDS
    )
    if refused.returncode == 0 or "without a key" not in refused.stderr:
        raise SystemExit(f"expected to be refused, got {refused.returncode}: {refused.stderr}")
    key = secrets.token_urlsafe(16)
    stage.env["GEMLOUPE_API_KEY"] = key
    print("--- CMD again, with a key", flush=True)
    server = subprocess.Popen(_shell(stage, stage.command))
    try:
        _wait(server)
        uid = int(Path(f"/proc/{server.pid}/status").read_text().split("Uid:")[1].split()[0])
        if uid == 0:
            raise SystemExit("the server runs as root")
        print(f"{SERVER}/health: 200, as user {uid}")
        body = {"messages": [{"role": "user", "content": "What is 27 + 45?"}], "temperature": 0}
        try:
            _post("/v1/chat/completions", body, {})
            raise SystemExit("a chat without the key was answered")
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
        answer = _post("/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
        text = answer["choices"][0]["message"]["content"]
        print(f"{SERVER}/v1/chat/completions: {text!r}")
        if "72" not in text:
            raise SystemExit("expected an answer with 72")
    finally:
        server.terminate()
        if server.wait(60) not in (0, -15, 143):
            raise SystemExit(f"the server ended with {server.returncode}")


def _wait(server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{SERVER}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if server.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the server did not answer /health (ended: {server.poll()})")
        time.sleep(0.2)


def _post(path: str, body: object, headers: dict[str, str]) -> dict:
    request = urllib.request.Request(SERVER + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def _call(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
