"""The models of one server and the names that clients give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemloupe import towers
from gemloupe.errors import one_of, quoted
from gemloupe.sampling import default_sampling
from gemloupe.serving.failure import ApiError
from gemloupe.serving.scheduler import Scheduler

_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(eq=False)
class Served:
    """One model with its scheduler."""

    name: str
    model: Any
    scheduler: Scheduler
    drafter: Any = None
    """What guesses tokens of its rows, or None."""

    @property
    def adapters(self) -> list[str]:
        names: list[str] = list(self.model.list_adapters()["name"])
        return names

    @property
    def facts(self) -> dict[str, Any]:
        """What a client's controls depend on."""
        text = self.model.config.text
        routed = [index for index, layer in enumerate(text.layers) if layer.has_experts]
        sampling = default_sampling(self.model.generation_config, text.vocab_size)
        return {
            "images": towers.has_vision(self.model.checkpoint),
            "audio": towers.has_audio(self.model.checkpoint),
            "context": text.max_position_embeddings,
            "experts": text.num_experts,
            "expert_layers": routed,
            "sampling": {name: getattr(sampling, name) for name in _SAMPLING},
        }


@dataclass(frozen=True)
class Found:
    served: Served
    adapter: str | None
    warnings: tuple[str, ...] = ()


class Registry:
    """Names are those that the server was started with, aliases, and each with `:adapter`.

    An adapter's own name is one too, where one model alone has it.
    """

    def __init__(self, models: Sequence[Served], aliases: Mapping[str, Served]) -> None:
        """The first model answers requests without a name; alone, it answers to any."""
        self.models = list(models)
        self._named = {served.name: served for served in models} | dict(aliases)

    @property
    def names(self) -> list[str]:
        """Every name, those of adapters included."""
        return [
            name
            for base, served in self._named.items()
            for name in (base, *(f"{base}:{adapter}" for adapter in served.adapters))
        ]

    def find(self, name: str) -> Found:
        """ApiError 404 for a name of nothing where there are several models."""
        default = self.models[0]
        if not name:
            return Found(default, None)
        if name in self._named:
            return Found(self._named[name], None)
        base, colon, adapter = name.rpartition(":")
        if name.endswith(":latest") and base in self._named:
            return Found(self._named[base], None)
        owner = self._named.get(base) or (default if len(self.models) == 1 else None)
        if colon and owner is not None and adapter in owner.adapters:
            return Found(owner, adapter, () if base in self._named else (_warning(base, owner),))
        if base in self._named:
            raise ApiError(
                404,
                f"model {quoted(base)} has no adapter {quoted(adapter)}; "
                f"expected {one_of(owner.adapters) or 'none: no adapter is loaded'}"
                if owner is not None
                else f"no adapter {quoted(adapter)}",
                param="model",
                code="model_not_found",
            )
        owners = [served for served in self.models if name in served.adapters]
        if len(owners) == 1:  # As vLLM's clients name adapters.
            return Found(owners[0], name)
        if len(self.models) == 1:
            return Found(default, None, (_warning(name, default),))
        raise ApiError(
            404,
            f"no model {quoted(name)}; expected {one_of(self.names[:20])}",
            param="model",
            code="model_not_found",
        )


def _warning(name: str, served: Served) -> str:
    return f"there is no model {quoted(name)} here: {quoted(served.name)} answered"
