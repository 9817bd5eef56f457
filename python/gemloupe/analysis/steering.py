"""Steering vectors: the direction in which two sets of prompts differ inside the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe import edits, hooks
from gemloupe.analysis import arguments
from gemloupe.capturing import at
from gemloupe.errors import quoted

if TYPE_CHECKING:
    from gemloupe.model import Model

_FORMAT = "gemloupe steering vector 1"


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """One direction for each of some hook points; `model.generate(x, edit=vector.edit(2.0))`."""

    vectors: Mapping[str, np.ndarray]
    """Hook point -> float32, of the shape that one position has there: [D]."""
    separation: Mapping[str, float]
    """Hook point -> difference of the two sets' mean projections on the vector, in units of their
    pooled standard deviation there: how well it tells the prompts apart that it was made from.
    NaN for single prompts."""
    positives: int
    """How many prompts the means were taken over."""
    negatives: int

    def __getitem__(self, name: str) -> np.ndarray:
        return self.vectors[name]

    def edit(
        self, scale: float = 1.0, points: str | Iterable[str] | None = None, positions: Any = None
    ) -> dict[str, Any]:
        """Returns the mapping for `edit=`: each vector times `scale` is added at its point.

        `points`: names of this vector's points, all by default; one layer is the usual choice.
        `positions` as in `gl.edits.add`; None for all, generated ones included. KeyError for a
        point that the vector does not have.
        """
        names = [points] if isinstance(points, str) else list(points or self.vectors)
        for name in names:
            if name not in self.vectors:
                raise KeyError(
                    f"{quoted(name)} has no vector; expected one of {list(self.vectors)}"
                )
        return {
            name: edits.add(np.float32(scale) * self.vectors[name], positions=positions)
            for name in names
        }

    def random(self, seed: int = 0) -> SteeringVector:
        """Returns the control: random directions of the same norms, with no separation."""
        rng = np.random.default_rng(seed)
        drawn = {}
        for name, vector in self.vectors.items():
            noise = rng.standard_normal(vector.shape)
            noise *= np.linalg.norm(vector) / np.linalg.norm(noise)
            drawn[name] = noise.astype(np.float32)
        return replace(self, vectors=drawn, separation=dict.fromkeys(drawn, float("nan")))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, replacing one that is there."""
        from safetensors.numpy import save_file

        about = {
            "format": _FORMAT,
            "separation": json.dumps({k: repr(float(v)) for k, v in self.separation.items()}),
            "positives": str(self.positives),
            "negatives": str(self.negatives),
        }
        save_file({name: np.ascontiguousarray(v) for name, v in self.vectors.items()}, path, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteeringVector:
        """Reads what `save` wrote; ValueError for another file, FileNotFoundError for none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError(
                        f"{path}: format is {quoted(about.get('format'))}; expected {_FORMAT!r}, "
                        "a file that SteeringVector.save wrote"
                    )
                vectors = {name: file.get_tensor(name) for name in file.keys()}
            separation = {k: float(v) for k, v in json.loads(about["separation"]).items()}
            counts = int(about["positives"]), int(about["negatives"])
        except (SafetensorError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path}: {error}; expected a file that SteeringVector.save wrote"
            ) from error
        for name, vector in vectors.items():
            if vector.dtype != np.float32 or name not in separation:
                raise ValueError(
                    f"{path}: {quoted(name)} is {vector.dtype}; expected float32 with a separation"
                )
        order = [name for name in separation if name in vectors]
        return cls({n: vectors[n] for n in order}, separation, *counts)

    def __repr__(self) -> str:
        lines = [f"SteeringVector({self.positives} positive, {self.negatives} negative prompts)"]
        lines += [
            f"  {name}  norm {np.linalg.norm(vector):.3g}  separation {self.separation[name]:.2f}"
            for name, vector in self.vectors.items()
        ]
        return "\n".join(lines)


def steering_vector(
    model: Model,
    positive: Sequence[Any],
    negative: Sequence[Any],
    point: str | Iterable[str] = "layers.*.resid_post",
    position: Any = -1,
    *,
    norm: float | None = None,
) -> SteeringVector:
    """Mean activation over the positive prompts minus that over the negative ones.

    (Turner et al., "Activation addition", 2023; Rimsky et al., "Contrastive activation addition",
    2024.) `positive`, `negative`: lists of inputs as `model.run` takes them; pairs that differ in
    one respect work best. `point`: hook points or patterns with one row a position; every one gets
    a vector. `position`: whose activation, −1 the last; of several (a slice, "user", None for all)
    the mean over them in each prompt. `norm`: scale every vector to this length; None keeps the
    difference as it is, which is in units of the residual stream.

    Use: `model.generate(x, edit=vector.edit(4.0, "layers.5.resid_post"))`, beside the control
    `vector.random().edit(4.0, "layers.5.resid_post")`.

    Holds one prompt's activations at a time. ValueError for empty lists, a position outside a
    prompt, or a vector of zeros that a norm is asked of.
    """
    for name, prompts in (("positive", positive), ("negative", negative)):
        if isinstance(prompts, (str, bytes)) or not len(prompts):
            raise ValueError(f"{name} is {quoted(prompts)}; expected a list of one prompt or more")
    points, _ = hooks.select(point, model.config.text)
    names = [hook.name for hook in points]
    for name in names:
        arguments.row_shape(name, model)
    plus = [_activations(model, prompt, names, position) for prompt in positive]
    minus = [_activations(model, prompt, names, position) for prompt in negative]
    vectors, separation = {}, {}
    for column, name in enumerate(names):
        a = np.stack([row[column] for row in plus]).astype(np.float64)
        b = np.stack([row[column] for row in minus]).astype(np.float64)
        vector = a.mean(axis=0) - b.mean(axis=0)
        length = float(np.linalg.norm(vector))
        if norm is not None:
            if length == 0:
                raise ValueError(
                    f"{name} is the same in both sets; a norm cannot be given to zeros"
                )
            vector *= norm / length
        vectors[name] = vector.astype(np.float32)
        separation[name] = _separation(a, b, vector)
    return SteeringVector(vectors, separation, len(positive), len(negative))


def _activations(
    model: Model, prompt: Any, names: Sequence[str], position: Any
) -> list[np.ndarray]:
    """Returns the mean over the positions at each point."""
    run = model.run(
        prompt,
        capture=dict.fromkeys(names, at(position, reduce="mean")),
        logits=None,
        routing=False,
    )
    if isinstance(run, list):
        raise ValueError("a prompt is a batch; expected one input: put its rows into the list")
    values = [np.array(run[name]) for name in names]
    if not values[0].size:
        raise ValueError(
            f"position {quoted(position)} is outside a prompt of {len(run.prompt)} tokens"
        )
    return values


def _separation(a: np.ndarray, b: np.ndarray, vector: np.ndarray) -> float:
    """Returns Cohen's d of the projections of [n, …] and [m, …] on a vector."""
    if len(a) + len(b) < 4 or min(len(a), len(b)) < 2:
        return float("nan")
    p, q = (x.reshape(len(x), -1) @ vector.ravel() for x in (a, b))
    pooled = (((p - p.mean()) ** 2).sum() + ((q - q.mean()) ** 2).sum()) / (len(p) + len(q) - 2)
    return float((p.mean() - q.mean()) / np.sqrt(pooled)) if pooled > 0 else float("nan")
