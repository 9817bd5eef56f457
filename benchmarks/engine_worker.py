"""One engine in a process of its own: loads, prefills, decodes, and prints what it took as JSON.

`text_speed.py` starts it with one argument, a JSON object:
    engine     "gemloupe", "transformers", or "bandwidth" (only measures the memory)
    checkpoint, dtype, attention (transformers: "sdpa" or "eager"), threads
    prompts    lengths; every prompt is random ids after one BOS
    new        tokens decoded after the first prompt
    seed       of the prompts
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FIRST_ID = 300  # Below are control tokens.


class Engine(Protocol):
    """Both work on ids, greedily."""

    def generate(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        """Returns (seconds from the call to the first of `new` tokens, seconds of each other)."""

    def facts(self) -> dict[str, Any]:
        """Returns what else is worth knowing."""


class Gemloupe:
    """gemloupe through its public API."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import gemloupe

        self.imported = time.perf_counter()
        self._model = gemloupe.load(
            spec["checkpoint"], dtype=spec["dtype"], threads=spec["threads"]
        )
        self.loaded = time.perf_counter()

    def generate(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        import gemloupe

        out = self._model.generate(ids, max_new_tokens=new, temperature=0)
        assert isinstance(out, gemloupe.Output)
        times = out.timings
        if times.decode_tokens == 0 and new > 1:  # Fewer than `new` are enough for a rate.
            raise RuntimeError("the model ended its answer at once; give another --seed")
        each = times.decode_seconds / max(times.decode_tokens, 1)
        return times.time_to_first_token, [each] * times.decode_tokens

    def facts(self) -> dict[str, Any]:
        from gemloupe import _core

        core = self._model.core
        return {
            "copied_bytes": core.copied_bytes,
            "mapped_bytes": core.mapped_bytes,
            "isa": _core.isa(),
            "onednn": _core.onednn_version(),
        }


class Transformers:
    """The reference's own classes, one forward pass a token without `generate`'s bookkeeping."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(spec["threads"])
        self.imported = time.perf_counter()
        config = json.loads((Path(spec["checkpoint"]) / "config.json").read_text())
        model_class = getattr(transformers, config["architectures"][0])
        self._model = model_class.from_pretrained(
            spec["checkpoint"],
            dtype=getattr(torch, spec["dtype"]),
            attn_implementation=spec["attention"],
        ).eval()
        self.loaded = time.perf_counter()

    def generate(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        import torch

        seconds = []
        cache = None
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            for _ in range(new):
                begin = time.perf_counter()
                out = self._model(
                    input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                tokens = out.logits[:, -1:].argmax(-1)
                cache = out.past_key_values
                seconds.append(time.perf_counter() - begin)
        return seconds[0], seconds[1:]

    def facts(self) -> dict[str, Any]:
        import torch
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}


def memory() -> dict[str, int]:
    """Bytes of this process: VmHWM (peak RSS), RssAnon (its own) and RssFile (mapped files)."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found


def vocab_size(checkpoint: str) -> int:
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    return config.get("text_config", config)["vocab_size"]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    engine = (Gemloupe if spec["engine"] == "gemloupe" else Transformers)(spec)
    result: dict[str, Any] = {
        "import_seconds": engine.imported - begin,
        "load_seconds": engine.loaded - engine.imported,
        "memory_after_load": memory(),
    }
    vocab = vocab_size(spec["checkpoint"])
    prompts = []
    for index, length in enumerate(spec["prompts"]):
        ids = np.random.default_rng([spec["seed"], index]).integers(FIRST_ID, vocab, length - 1)
        prompts.append([2, *ids.tolist()])
    # The first call touches the mapped pages and compiles oneDNN's code; it is told apart.
    result["first_call_seconds"] = engine.generate(prompts[0], 1)[0]
    result["first_tokens"] = {}
    anonymous = [memory()["RssAnon"]]
    for index, ids in enumerate(prompts):
        first, each = engine.generate(ids, spec["new"] if index == 0 else 1)
        result["first_tokens"][str(len(ids))] = first
        if index == 0:
            result["decode_seconds"] = each
        anonymous.append(memory()["RssAnon"])
    return {
        **result,
        "peak_rss": memory()["VmHWM"],
        "rss_anon": max(anonymous),
        **engine.facts(),
    }


def main() -> int:
    spec = json.loads(sys.argv[1])
    if spec["engine"] == "bandwidth":
        from gemloupe import _core

        result = {"bytes_per_second": 1e9 * _core.measure_bandwidth(spec["threads"])}
    else:
        result = measure(spec)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
