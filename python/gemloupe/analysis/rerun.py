"""Runs one prompt many times with edits, without computing again what they cannot reach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gemloupe.model import Model
    from gemloupe.prompt import Prompt


class Rerun:
    """A prompt whose positions before an edit are read from the cache of an unedited run."""

    def __init__(self, model: Model, prompt: Prompt) -> None:
        self._model = model
        self._ids = prompt.ids
        # Every position is kept, so that the cache can be cut anywhere.
        self._cache = model.new_cache(sliding="full")
        self.logits: np.ndarray = model.run(prompt, cache=self._cache).logits[0]
        """float32 [V]: the last position's, without edits."""

    def edited(self, edit: Any, first: int) -> np.ndarray:
        """Returns the last position's logits [V]; `edit` changes no position before `first`."""
        cache = self._cache.fork()
        cache.truncate(first)
        return self._model.run(self._ids[first:], cache=cache, edit=edit).logits[0]
