"""The vision tower of 26B-A4B and 31B (27 layers) on one picture, beside transformers.

    python benchmarks/vision_tower.py FOLDER [--size 768] [--dtype float32] [--rounds 3]

FOLDER gets a file of random weights (2.2 GB in float32) unless it has one. Each engine is a process
of its own that encodes the picture once to warm up and then `rounds` times; transformers runs in
float32 with its default attention (sdpa) and with eager attention. Both get the same patches, and
the largest difference of their soft tokens is printed: time means nothing where they differ.
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
from gemloupe.media.images import Image, read_image
from gemloupe.media.vision import core_config
from gemloupe.variants import VARIANTS
from gemloupe.vision_config import VisionConfig, read_vision_config

FILE = "vision.safetensors"
ENGINES = ("gemloupe", "sdpa", "eager")
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def tower() -> VisionConfig:
    """The tower of 26B-A4B with the projection into its text model."""
    raw = VARIANTS["26B-A4B"].raw
    config = read_vision_config(raw, raw["text_config"]["hidden_size"], "config.json")
    assert config is not None
    return config


def shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tower's tensors, without the "model." of checkpoints."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    query = config.num_attention_heads * head
    found: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embedder.input_proj.weight": (hidden, 3 * config.patch_size**2),
        "vision_tower.patch_embedder.position_embedding_table": (
            2, config.position_embedding_size, hidden,
        ),
        "vision_tower.std_bias": (hidden,),
        "vision_tower.std_scale": (hidden,),
        "embed_vision.embedding_projection.weight": (config.text_hidden_size, hidden),
    }  # fmt: skip
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for layer in range(config.num_hidden_layers):
        of = f"vision_tower.encoder.layers.{layer}."
        found |= {f"{of}{norm}_layernorm.weight": (hidden,) for norm in norms}
        found |= {f"{of}self_attn.{name}_norm.weight": (head,) for name in "qk"}
        found |= {f"{of}self_attn.{n}_proj.linear.weight": (query, hidden) for n in "qkv"}
        found[f"{of}self_attn.o_proj.linear.weight"] = (hidden, query)
        found |= {f"{of}mlp.{n}_proj.linear.weight": (inner, hidden) for n in ("gate", "up")}
        found[f"{of}mlp.down_proj.linear.weight"] = (hidden, inner)
    return found


def write_weights(path: Path, dtype: str) -> None:
    """Writes random weights, tensor by tensor."""
    rng = np.random.default_rng(0)
    width = 4 if dtype == "float32" else 2
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(tower()).items():
        begin, end = end, end + width * int(np.prod(shape))
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes(tower()).items():
            values = rng.standard_normal(int(np.prod(shape)), dtype=np.float32)
            values = values * 0.1 + 1 if len(shape) == 1 else values / np.float32(shape[-1] ** 0.5)
            if name.endswith("q_norm.weight"):
                # Scores are not divided by the root of the head size: at full weight random queries
                # would each see one key, and rounding would decide which.
                values = values / np.float32(shape[0] ** 0.5)
            file.write(values if width == 4 else (values.view(np.uint32) >> 16).astype("<u2"))
    partial.rename(path)


def picture(size: int) -> Image:
    pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3), np.uint8)
    return read_image(pixels, "picture", tower().cell)


def gemloupe_encoder(path: Path, threads: int) -> Any:
    from gemloupe.safetensors_header import read_header

    entries = [
        _core.TensorEntry(
            info.name,
            {"F32": "float32", "BF16": "bfloat16"}[info.dtype],
            list(info.shape),
            info.begin,
            info.end,
        )
        for info in read_header(path)
    ]
    weights = _core.Weights()
    weights.add_file(str(path), entries)
    options = _core.VisionOptions()
    options.threads = threads
    model = _core.VisionModel(core_config(tower()), weights, options)

    def encode(image: Image, adapters: Any = ()) -> np.ndarray:
        side = tower().patch_size
        columns = image.pixels.shape[1] // side
        return model.encode(image.patches(side), columns, adapters=list(adapters))

    return encode


def transformers_encoder(path: Path, threads: int, attention: str) -> Any:
    import torch
    from safetensors.torch import load_file
    from transformers import Gemma4VisionConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

    torch.set_num_threads(threads)
    raw = dict(VARIANTS["26B-A4B"].raw["vision_config"])
    config = Gemma4VisionConfig(**{k: v for k, v in raw.items() if k != "rope_parameters"})
    config._attn_implementation = attention
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    projection = tensors.pop("embed_vision.embedding_projection.weight")
    with torch.device("meta"):
        model = Gemma4VisionModel(config)
    state = {name.removeprefix("vision_tower."): tensor for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True, strict=True)
    model.encoder.rotary_emb = type(model.encoder.rotary_emb)(config)  # No file has its buffers.
    model.eval()

    def encode(image: Image) -> np.ndarray:
        patches = image.patches(config.patch_size)
        columns = image.pixels.shape[1] // config.patch_size
        # As the processor gives them: padded to the budget.
        most = 9 * 280
        values = torch.zeros(1, most, patches.shape[1])
        values[0, : len(patches)] = torch.from_numpy(patches)
        places = torch.full((1, most, 2), -1)
        at = torch.arange(len(patches))
        places[0, : len(patches)] = torch.stack([at % columns, at // columns], dim=-1)
        with torch.no_grad():
            x = model(values, places).last_hidden_state
            x = x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).pow(-0.5)
            return (x @ projection.T).numpy()

    return encode


def measure(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one engine's process does."""
    path = arguments.folder / FILE
    begin = time.perf_counter()
    if engine == "gemloupe":
        encode = gemloupe_encoder(path, arguments.threads)
    else:
        encode = transformers_encoder(path, arguments.threads, engine)
    loaded = time.perf_counter() - begin
    image = picture(arguments.size)
    tokens = encode(image)
    np.save(arguments.folder / f"{engine}.npy", tokens)
    taken = []
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        encode(image)
        taken.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"engine": engine, "load": loaded, "seconds": taken, "peak_rss": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=768, help="pixels of the picture's side")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(measure(arguments.engine, arguments)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not (arguments.folder / FILE).is_file():
        write_weights(arguments.folder / FILE, arguments.dtype)
    results = []
    for engine in arguments.engines:
        command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    report(results, arguments)


def report(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    side = picture(arguments.size)
    print(f"{side.width} x {side.height} pixels, {side.soft_tokens} soft tokens, "
          f"{arguments.threads} threads, {_core.isa()}, {_core.cpu_model()}")  # fmt: skip
    print("| engine | load s | seconds | peak RSS GiB |\n| --- | ---: | ---: | ---: |")
    for result in results:
        median = statistics.median(result["seconds"])
        result["median"] = median
        print(
            f"| {result['engine']} | {result['load']:.1f} | {median:.2f} | "
            f"{result['peak_rss'] / 2**30:.2f} |"
        )
    tokens = {r["engine"]: np.load(arguments.folder / f"{r['engine']}.npy") for r in results}
    for engine in list(tokens)[1:]:
        first = next(iter(tokens))
        gap = np.abs(tokens[first] - tokens[engine]).max()
        print(f"largest difference of {first} and {engine}: {gap:.2e} "
              f"of {np.abs(tokens[engine]).max():.2f}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
