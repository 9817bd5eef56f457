"""One engine in a process of its own, told by hooks.py to look into a model or to change it.

Commands, as in serve_engine.py (JSON in, JSON out); prompts are lists of ids, all of one length:
    load       engine, path, threads, and options of the engine: see the classes
    residuals  prompts. All resid_post of all layers and tokens.
    grid       clean, corrupted, cells: resid_post of the corrupted prompt replaced by the clean
               one's in one (layer, position) a pass. Answers seconds before the first cell and of
               each; gemloupe makes the whole grid, and answers its seconds and cells.
    steer      prompt, new, layer. Generates with a vector added to resid_post.
    dump       prompts, layer, folder. Writes resid_post as float32, a file a prompt.
    experts    prompts, pairs. The last logits without one expert, for each (layer, expert).
    plain      prompt, new, clock. Seconds of reading the prompt, and of a token that is decoded
               after 8 of its ids.
clock is "seconds", or "cpu": CPU seconds of all threads.
    cost       what, prompt, new, rounds, clock. See Gemloupe.cost.
Each but load answers seconds, CPU seconds of all threads (cpu), and the largest memory of this
command (peak_rss, bytes).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from serve_engine import memory, serve

Ids = list[int]
CLOCKS = {"seconds": time.perf_counter, "cpu": time.process_time}


class Gemloupe:
    """Options: dtype, … as in gemloupe.load."""

    def __init__(self, path: str, threads: int, **options: Any) -> None:
        import gemloupe

        begin = time.perf_counter()
        self._model = gemloupe.load(path, threads=threads, **options)
        self.load_seconds = time.perf_counter() - begin

    def about(self) -> dict[str, Any]:
        from gemloupe import _core

        return {"versions": {"gemloupe": _core.__version__, "onednn": _core.onednn_version()}}

    def residuals(self, prompts: list[Ids]) -> dict[str, Any]:
        runs = self._model.run(prompts, capture="layers.*.resid_post", logits=None, routing=False)
        assert all(len(run.captured) for run in runs)
        return {}

    def grid(self, clean: Ids, corrupted: Ids, cells: list[list[int]]) -> dict[str, Any]:
        import gemloupe

        # Both are ids: the metric needs no tokenizer.
        grid = gemloupe.patching_grid(
            self._model, clean, corrupted, metric=lambda logits: logits[5]
        )
        return {"cells": grid.values.size, "computed": int(grid.computed.sum())}

    def steer(self, prompt: Ids, new: int, layer: int) -> dict[str, Any]:
        from gemloupe import edits

        edit = {f"layers.{layer}.resid_post": edits.add(steering(self._model.config.text))}
        out = self._model.generate(prompt, max_new_tokens=new, temperature=0, edit=edit)
        return {"tokens": len(out.ids)}

    def dump(self, prompts: list[Ids], layer: int, folder: str) -> dict[str, Any]:
        name = f"layers.{layer}.resid_post"
        for i, prompt in enumerate(prompts):
            run = self._model.run(prompt, capture=name, logits=None, routing=False)
            run[name].tofile(Path(folder) / f"{i}.bin")
        return {}

    def experts(self, prompts: list[Ids], pairs: list[list[int]]) -> dict[str, Any]:
        from gemloupe import edits

        bases = [self._model.run(prompt, keep=True, routing=False) for prompt in prompts]
        for layer, expert in pairs:
            edit = {f"layers.{layer}.router.logits": edits.ablate_experts([expert])}
            for base in bases:
                self._model.run(base, edit=edit, routing=False)
        return {}

    def plain(self, prompt: Ids, new: int, clock: str) -> dict[str, Any]:
        now = CLOCKS[clock]
        begin = now()
        self._model.run(prompt)
        prefill = now() - begin
        return {"prefill": prefill, "decode": self._decode(prompt[:8], new, clock)}

    def _decode(self, prompt: Ids, new: int, clock: str, **hooked: Any) -> float:
        """Seconds a token. The prompt but its last id is read before the clock starts, so that
        every pass that counts is of one row."""
        now = CLOCKS[clock]
        cache = self._model.run(prompt[:-1]).cache
        begin = now()
        out = self._model.generate(
            prompt[-1:], cache=cache, max_new_tokens=new, temperature=0, **hooked
        )
        return (now() - begin) / len(out.ids)

    def cost(self, what: str, prompt: Ids, new: int, rounds: int, clock: str) -> dict[str, Any]:
        """Seconds without and with hooks, in turns.

        "capture": one pass with the logits of all rows, without and with all resid_post.
        "function": a decoded token, without and with a Python edit at each layer's resid_post.
        "trace": a decoded token, routing=False and routing="experts".
        """

        now = CLOCKS[clock]

        def capture(hooked: bool) -> float:
            names = "layers.*.resid_post" if hooked else ()
            begin = now()
            self._model.run(prompt, capture=names, logits="all", routing=False)
            return now() - begin

        def function(hooked: bool) -> float:
            edit = {"layers.*.resid_post": lambda x: x} if hooked else None
            return self._decode(prompt[:8], new, clock, edit=edit, routing=False)

        def trace(hooked: bool) -> float:
            return self._decode(prompt[:8], new, clock, routing="experts" if hooked else False)

        measure = {"capture": capture, "function": function, "trace": trace}[what]
        measure(True)
        pairs = []
        for number in range(rounds):
            order = (False, True) if number % 2 == 0 else (True, False)
            found = {hooked: measure(hooked) for hooked in order}
            pairs.append([found[False], found[True]])
        return {"pairs": pairs, "layers": self._model.config.text.num_hidden_layers}


class Transformers:
    """Forward hooks on transformers' own modules. Options: dtype, attention ("sdpa", "eager")."""

    def __init__(self, path: str, threads: int, dtype: str, attention: str = "sdpa") -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch, self._dtype = torch, getattr(torch, dtype)
        config = json.loads((Path(path) / "config.json").read_text())
        model_class = getattr(transformers, config["architectures"][0])
        begin = time.perf_counter()
        self._hf = model_class.from_pretrained(
            path, dtype=self._dtype, attn_implementation=attention
        ).eval()
        self._wrap(path)
        self.load_seconds = time.perf_counter() - begin
        self._text = self._hf.config.get_text_config()
        self._layers = range(self._text.num_hidden_layers)

    def _wrap(self, path: str) -> None:
        """Makes the library's own object of the loaded model."""

    def about(self) -> dict[str, Any]:
        import transformers

        torch = self._torch
        return {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}

    def _tensor(self, prompts: list[Ids]) -> Any:
        return self._torch.tensor(prompts)

    def _vector(self) -> Any:
        return self._torch.from_numpy(steering(self._text)).to(self._dtype)

    def _layer(self, number: int) -> Any:
        return self._hf.get_decoder().layers[number]

    def residuals(self, prompts: list[Ids]) -> dict[str, Any]:
        kept = self._residuals(self._tensor(prompts))
        shape = (len(prompts), len(prompts[0]), self._text.hidden_size)
        assert len(kept) == len(self._layers) and all(tuple(x.shape) == shape for x in kept)
        return {}

    def _residuals(self, ids: Any) -> list[Any]:
        kept: list[Any] = []
        handles = [
            self._layer(i).register_forward_hook(lambda module, args, out: kept.append(out))
            for i in self._layers
        ]
        # The text model alone: no logits are asked for.
        self._hf.get_decoder()(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return kept

    def grid(self, clean: Ids, corrupted: Ids, cells: list[list[int]]) -> dict[str, Any]:
        begin = time.perf_counter()
        source = self._residuals(self._tensor([clean]))
        ids = self._tensor([corrupted])
        before = time.perf_counter() - begin
        seconds = []
        for layer, position in cells:
            begin = time.perf_counter()
            logits = self._patched(ids, layer, position, source[layer][:, position])
            assert logits.shape[-1] == self._text.vocab_size
            seconds.append(time.perf_counter() - begin)
        return {"before": before, "each": seconds}

    def _patched(self, ids: Any, layer: int, position: int, value: Any) -> Any:
        row = self._row(layer, position, ids.shape[1])

        def patch(module: Any, args: Any, out: Any) -> Any:
            if row is not None:
                out[:, row] = value
            return out

        handle = self._layer(layer).register_forward_hook(patch)
        logits = self._hf(input_ids=ids, logits_to_keep=1, use_cache=False).logits
        handle.remove()
        return logits

    def _row(self, layer: int, position: int, length: int) -> int | None:
        """The row of a layer's output; None where logits_to_keep=1 leaves it out: layers that share
        keys and values then compute the last row only."""
        shared = getattr(self._text, "num_kv_shared_layers", 0) or 0
        if layer < len(self._layers) - shared:
            return position
        return -1 if position == length - 1 else None

    def steer(self, prompt: Ids, new: int, layer: int) -> dict[str, Any]:
        vector = self._vector()
        handle = self._layer(layer).register_forward_hook(lambda module, args, out: out + vector)
        ids = self._hf.generate(
            self._tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        handle.remove()
        return {"tokens": ids.shape[1] - len(prompt)}

    def dump(self, prompts: list[Ids], layer: int, folder: str) -> dict[str, Any]:
        for i, prompt in enumerate(prompts):
            save(self._until(self._tensor([prompt]), layer), Path(folder) / f"{i}.bin")
        return {}

    def _until(self, ids: Any, layer: int) -> Any:
        """resid_post of a layer; later layers do not run."""

        class Enough(Exception):
            pass

        kept: list[Any] = []

        def stop(module: Any, args: Any, out: Any) -> None:
            kept.append(out)
            raise Enough

        handle = self._layer(layer).register_forward_hook(stop)
        try:
            self._hf.get_decoder()(input_ids=ids, use_cache=False)
        except Enough:
            pass
        finally:
            handle.remove()
        return kept[0]

    def experts(self, prompts: list[Ids], pairs: list[list[int]]) -> dict[str, Any]:
        ids = self._tensor(prompts)
        for layer, expert in pairs:
            logits = self._without_expert(ids, layer, expert)
            assert logits.shape[0] == len(prompts)
        return {}

    def _without_expert(self, ids: Any, layer: int, expert: int) -> Any:
        def ablate(router: Any, args: Any, out: Any) -> Any:
            return self._rerouted(router, out[0], expert)

        handle = self._layer(layer).router.register_forward_hook(ablate)
        logits = self._hf(input_ids=ids, logits_to_keep=1, use_cache=False).logits
        handle.remove()
        return logits

    def _rerouted(self, router: Any, probabilities: Any, expert: int) -> Any:
        """The router's three outputs without an expert: the next one comes in."""
        torch = self._torch
        rest = probabilities.clone()
        rest[..., expert] = 0
        weights, chosen = torch.topk(rest, self._text.top_k_experts, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True) * router.per_expert_scale[chosen]
        return rest, weights, chosen


class Nnsight(Transformers):
    """nnsight's traces around the same model."""

    def _wrap(self, path: str) -> None:
        from nnsight.modeling.transformers import TransformersModel

        self._nn = TransformersModel(self._hf, tokenizer=tokenizer(), task="text-generation")

    def about(self) -> dict[str, Any]:
        import nnsight

        about = super().about()
        about["versions"]["nnsight"] = nnsight.__version__
        return about

    def _layer(self, number: int) -> Any:
        return self._nn.model.language_model.layers[number]

    def _residuals(self, ids: Any) -> list[Any]:
        import nnsight

        with self._nn.trace(input_ids=ids, use_cache=False) as tracer:
            kept = nnsight.save([self._layer(i).output for i in self._layers])
            tracer.stop()
        return kept

    def _patched(self, ids: Any, layer: int, position: int, value: Any) -> Any:
        row = self._row(layer, position, ids.shape[1])
        with self._nn.trace(input_ids=ids, logits_to_keep=1, use_cache=False):
            if row is not None:
                self._layer(layer).output[:, row] = value
            logits = self._nn.lm_head.output.save()
        return logits

    def steer(self, prompt: Ids, new: int, layer: int) -> dict[str, Any]:
        vector, ids = self._vector(), self._tensor([prompt])
        counted = []
        with self._nn.generate(
            input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False
        ) as tracer:
            for step in tracer.iter[:]:
                self._layer(layer).output[:] = self._layer(layer).output + vector
                counted.append(step)
        return {"tokens": new}

    def _until(self, ids: Any, layer: int) -> Any:
        with self._nn.trace(input_ids=ids, use_cache=False) as tracer:
            kept = self._layer(layer).output.save()
            tracer.stop()
        return kept

    def _without_expert(self, ids: Any, layer: int, expert: int) -> Any:
        router = self._hf.get_decoder().layers[layer].router
        with self._nn.trace(input_ids=ids, logits_to_keep=1, use_cache=False):
            out = self._layer(layer).router.output
            self._layer(layer).router.output = self._rerouted(router, out[0], expert)
            logits = self._nn.lm_head.output.save()
        return logits


class TransformerLens(Transformers):
    """TransformerLens's TransformerBridge around the same model; its attention is eager."""

    def _wrap(self, path: str) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self._bridge = TransformerBridge.boot_transformers(
            path, device="cpu", dtype=self._dtype, hf_model=self._hf, tokenizer=tokenizer()
        )

    def about(self) -> dict[str, Any]:
        from importlib.metadata import version

        about = super().about()
        about["versions"]["transformer_lens"] = version("transformer_lens")
        return about

    def _residuals(self, ids: Any) -> list[Any]:
        _, cache = self._bridge.run_with_cache(
            ids, names_filter=lambda name: name.endswith("hook_resid_post"), use_cache=False
        )
        return [cache[f"blocks.{i}.hook_resid_post"] for i in self._layers]

    def _patched(self, ids: Any, layer: int, position: int, value: Any) -> Any:
        row = self._row(layer, position, ids.shape[1])

        def patch(x: Any, hook: Any) -> Any:
            if row is not None:
                x[:, row] = value
            return x

        hooks = [(f"blocks.{layer}.hook_resid_post", patch)]
        return self._bridge.run_with_hooks(ids, fwd_hooks=hooks, logits_to_keep=1, use_cache=False)

    def steer(self, prompt: Ids, new: int, layer: int) -> dict[str, Any]:
        vector = self._vector()
        hooks = [(f"blocks.{layer}.hook_resid_post", lambda x, hook: x + vector)]
        with self._bridge.hooks(fwd_hooks=hooks):
            ids = self._bridge.generate(
                self._tensor([prompt]), max_new_tokens=new, do_sample=False, stop_at_eos=False,
                verbose=False,
            )  # fmt: skip
        return {"tokens": ids.shape[1] - len(prompt)}

    def _until(self, ids: Any, layer: int) -> Any:
        name = f"blocks.{layer}.hook_resid_post"
        _, cache = self._bridge.run_with_cache(ids, names_filter=name, stop_at_layer=layer + 1)
        return cache[name]

    def experts(self, prompts: list[Ids], pairs: list[list[int]]) -> dict[str, Any]:
        raise NotImplementedError("TransformerBridge has no hook for the router's choice")


ENGINES = {
    "gemloupe": Gemloupe,
    "transformers": Transformers,
    "nnsight": Nnsight,
    "transformer_lens": TransformerLens,
}


def steering(text: Any) -> np.ndarray:
    """float32 [D]: the same for every engine."""
    return np.random.default_rng(0).standard_normal(text.hidden_size).astype(np.float32)


def tokenizer() -> Any:
    """A demo model's: the libraries want one, though prompts are ids."""
    import transformers

    folder = Path(__file__).resolve().parent.parent / "python" / "gemloupe" / "demo" / "edge"
    return transformers.AutoTokenizer.from_pretrained(folder)


def save(tensor: Any, path: Path) -> None:
    tensor.float().numpy().tofile(path)


def reset_peak() -> None:
    """Lets VmHWM begin anew from what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


class Server:
    """Carries out commands on the one engine that it has loaded."""

    def __init__(self) -> None:
        self._engine: Any = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        op = command.pop("op")
        if op == "load":
            self._engine = ENGINES[command.pop("engine")](**command)
            return {"seconds": self._engine.load_seconds, **self._engine.about()}
        reset_peak()
        begin, cpu = time.perf_counter(), time.process_time()
        found = getattr(self._engine, op)(**command)
        times = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        return {**times, "peak_rss": memory()["VmHWM"], **found}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    serve(Server().answer)
