"""The audio tower of E2B (12 conformer layers) on 30 s of sound, beside transformers.

    python benchmarks/audio_tower.py FOLDER [--seconds 30] [--dtype float32] [--rounds 3]

FOLDER gets a file of random weights (1.2 GB in float32) unless it has one. Each engine is a process
of its own that makes the features and encodes the sound once to warm up and then `rounds` times;
transformers computes in float32. The largest difference of their soft tokens is printed: time means
nothing where they differ. "streamed" is gemloupe fed 100 ms at a time: the seconds of all pushes,
and of the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemloupe import _core
from gemloupe.variants import VARIANTS

FILE = "audio.safetensors"
ENGINES = ("gemloupe", "streamed", "transformers")
_VARIANT = "E2B"
_PUSH = 1_600  # Samples of 100 ms.


def reference(device: str) -> tuple[Any, Any]:
    """transformers' tower and its projection into the text model, without values on "meta"."""
    import torch
    from transformers import Gemma4AudioConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

    raw = VARIANTS[_VARIANT].raw
    config = Gemma4AudioConfig(**raw["audio_config"])
    config._attn_implementation = "eager"
    with torch.device(device):
        tower = Gemma4AudioModel(config)
        width = raw["text_config"]["hidden_size"]
        projection = torch.nn.Linear(config.output_proj_dims, width, bias=False)
    return tower.eval(), projection


def write_weights(path: Path, dtype: str) -> None:
    """Writes random weights, bounds of clipped linears that act, norms around 1."""
    import torch
    from safetensors.torch import save_file

    tower, projection = reference("meta")
    shapes = {f"audio_tower.{name}": t.shape for name, t in tower.state_dict().items()}
    shapes["embed_audio.embedding_projection.weight"] = projection.weight.shape
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(("_min", "_max")):
            value = torch.tensor(-4.0 if name.endswith("_min") else 4.0)
        elif len(shape) == 1:
            value = 0.8 + 0.4 * torch.rand(shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        tensors[name] = value.to(getattr(torch, dtype))
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


def sound(seconds: float) -> np.ndarray:
    """Tones and noise, float32 at 16 kHz."""
    rng = np.random.default_rng(1)
    t = np.arange(round(seconds * 16_000)) / 16_000
    tones = sum(np.sin(2 * np.pi * hertz * t) for hertz in (130, 310, 870, 2400))
    return (0.05 * tones * np.sin(9 * t) + rng.normal(0, 0.01, len(t))).astype(np.float32)


def gemloupe_tower(path: Path, threads: int) -> Any:
    from gemloupe.audio_config import read_audio_config
    from gemloupe.config import parse_config
    from gemloupe.media.audio_tower import Ears, make_tower
    from gemloupe.media.mel import MelOptions
    from gemloupe.safetensors_header import read_header

    names = {"F32": "float32", "BF16": "bfloat16"}
    weights = _core.Weights()
    entries = [
        _core.TensorEntry(i.name, names[i.dtype], list(i.shape), i.begin, i.end)
        for i in read_header(path)
    ]
    weights.add_file(str(path), entries)
    options = _core.AudioTowerOptions()
    options.threads = threads
    mel = MelOptions()
    config = read_audio_config(parse_config(VARIANTS[_VARIANT].raw), mel.feature_size)
    assert config is not None
    return make_tower(Ears(config, mel), weights, options)


def gemloupe_encoder(path: Path, threads: int) -> Any:
    tower = gemloupe_tower(path, threads)

    def encode(samples: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        begin = time.perf_counter()
        tokens = tower.encode(tower.ears.read(samples)).soft_tokens
        return tokens, {"seconds": time.perf_counter() - begin}

    return encode


def streamed_encoder(path: Path, threads: int) -> Any:
    from gemloupe.media.audio_tower import AudioStream

    tower = gemloupe_tower(path, threads)

    def encode(samples: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        stream = AudioStream(tower)
        parts, times = [], []
        for at in range(0, len(samples), _PUSH):
            begin = time.perf_counter()
            parts.append(stream.push(samples[at : at + _PUSH]))
            times.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        parts.append(stream.finish())
        times.append(time.perf_counter() - begin)
        return np.concatenate(parts), {"seconds": sum(times), "slowest push": max(times)}

    return encode


def transformers_encoder(path: Path, threads: int) -> Any:
    import torch
    from safetensors.torch import load_file
    from transformers import Gemma4AudioFeatureExtractor

    torch.set_num_threads(threads)
    tower, projection = reference("meta")
    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    projection.weight = torch.nn.Parameter(state.pop("embed_audio.embedding_projection.weight"))
    state = {name.removeprefix("audio_tower."): tensor for name, tensor in state.items()}
    tower.load_state_dict(state, assign=True, strict=True)
    tower.rel_pos_enc = type(tower.rel_pos_enc)(tower.config)  # No file has its buffers.
    for layer in tower.layers:
        layer.self_attn.softcap = torch.tensor(layer.self_attn.attention_logits_soft_cap)
    extractor = Gemma4AudioFeatureExtractor()

    def encode(samples: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        begin = time.perf_counter()
        features = extractor([samples], return_tensors="pt")
        with torch.inference_mode():
            out = tower(features["input_features"], features["input_features_mask"])
            x = out.last_hidden_state[out.attention_mask]
            norm = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + tower.config.rms_norm_eps)
            tokens = projection(x * norm).numpy()
        return tokens, {"seconds": time.perf_counter() - begin}

    return encode


def work(engine: str, folder: Path, arguments: argparse.Namespace) -> None:
    """The process of one engine: prints one JSON line and keeps its soft tokens in a file."""
    makers = {
        "gemloupe": gemloupe_encoder,
        "streamed": streamed_encoder,
        "transformers": transformers_encoder,
    }
    encode = makers[engine](folder / f"{arguments.dtype}-{FILE}", arguments.threads)
    samples = sound(arguments.seconds)
    tokens, _ = encode(samples)
    rounds = [encode(samples)[1] for _ in range(arguments.rounds)]
    np.save(folder / f"{engine}.npy", tokens)
    figures = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"engine": engine, "tokens": len(tokens), "peak_rss_mib": peak, **figures}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.engine:
        work(arguments.engine, folder, arguments)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arguments.dtype}-{FILE}"
    if not path.exists():
        write_weights(path, arguments.dtype)
    print(f"{arguments.seconds:g} s of sound, {arguments.dtype} weights, {arguments.threads} "
          f"threads, {_core.isa()}, {_core.cpu_model()}")  # fmt: skip
    for engine in ENGINES:
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(result.stdout.splitlines()[-1])
        slowest = figures.get("slowest push")
        push = "" if slowest is None else f" (slowest push of 100 ms: {1000 * slowest:.0f} ms)"
        print(f"{engine:13} {figures['tokens']} tokens in {figures['seconds']:.3f} s{push}, "
              f"peak {figures['peak_rss_mib']:.0f} MiB")  # fmt: skip
    tokens = {engine: np.load(folder / f"{engine}.npy") for engine in ENGINES}
    for engine in ENGINES[:-1]:
        error = np.abs(tokens[engine] - tokens["transformers"]).max()
        largest = np.abs(tokens["transformers"]).max()
        print(f"{engine}: largest difference {error:.2e} of values up to {largest:.2f}")


if __name__ == "__main__":
    main()
