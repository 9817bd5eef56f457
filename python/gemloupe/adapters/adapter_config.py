"""adapter_config.json of a PEFT folder: what it says about ranks and scales, and what can't be run.

Options that only matter in training (dropout, initialisation from data, …) are read over. Options
that change what the adapter computes are either supported or refused by name: none is skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemloupe import strict_json
from gemloupe.errors import bullet_list, did_you_mean, one_of, quoted

CONFIG_NAME = "adapter_config.json"

# Neither weights nor forward pass depend on these.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
    "megatron_core", "eva_config", "velora_config", "runtime_config", "qalora_group_size",
    "peft_version", "target_parameters", "modules_to_save", "bias", "ensure_weight_tying",
    "loftq_config", "corda_config", "lora_ga_config",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_bias", "fan_in_fan_out", "init_lora_weights", "trainable_token_indices",
}  # fmt: skip
# Initialisations that take a part out of the base weights, which then are no longer those that
# this model has; PEFT repeats them when it loads the adapter.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
_CONVERT = (
    "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…), which "
    "makes it a plain LoRA adapter"
)
_MAX_RANK = 1 << 20
# A model has some hundred modules; patterns with repetitions take longer, and few are needed.
_MAX_PATTERNS = 5000
_MAX_REPEATING = 50
_MAX_PATTERN = 500
_QUANTISED_NAME = re.compile(
    r"(bnb|[48]bit|nf4|gptq|awq|int[48]\b|fp8|[-_]qat[-_]?)", re.IGNORECASE
)


Patterns = tuple[tuple[re.Pattern[str], float], ...]
"""(end of a module's path, value) in the order in which they apply; the rule is PEFT's."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says, checked."""

    base_model: str
    """The model that it was trained on, as its trainer called it; "" where it doesn't say."""
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    token_indices: Mapping[str, tuple[int, ...]]
    """Name of an embedding -> ids of its trainable tokens."""
    ties_tokens: bool
    """Whether trainable tokens of the embedding count in the tied head too."""
    parameters: tuple[str, ...] = ()
    """target_parameters: ends of the names of parameters that were adapted, not modules."""
    notes: tuple[str, ...] = ()
    """Sentences for the report."""

    def rank_of(self, path: str) -> int:
        """The rank of the module at a path of the trained model, as PEFT finds it."""
        return int(_first_match(self.rank_pattern, self._target(path), self.rank))

    def scale_of(self, path: str) -> float:
        """alpha / r, or alpha / √r with rsLoRA, of the module at a path of the trained model."""
        rank = self.rank_of(path)
        alpha = _first_match(self.alpha_pattern, self._target(path), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _target(self, path: str) -> str:
        """What patterns are matched with: of a module whose weight is a target, the weight."""
        weight = f"{path}.weight"
        named = any(weight == p or weight.endswith(f".{p}") for p in self.parameters)
        return weight if named else path


def _first_match(patterns: Patterns, path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Reads and checks adapter_config.json.

    Raises FileNotFoundError, and ValueError that lists every option that is wrong or unsupported.
    """
    raw = strict_json.read_object(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{path}: peft_type is {quoted(kind)}; expected 'LORA'. Other kinds of adapters can't "
            f"be run: {_advice(kind)}"
        )
    problems = _unsupported(raw)
    check = _Fields(raw, problems)
    rank = check.number("r", 8, integer=True, low=1, high=_MAX_RANK)
    alpha = check.number("lora_alpha", 8)
    config = AdapterConfig(
        base_model=check.text("base_model_name_or_path"),
        rank=int(rank),
        alpha=alpha,
        use_rslora=check.flag("use_rslora"),
        use_dora=check.flag("use_dora"),
        lora_bias=check.flag("lora_bias"),
        rank_pattern=check.patterns("rank_pattern", integer=True),
        alpha_pattern=check.patterns("alpha_pattern"),
        token_indices=check.token_indices(),
        ties_tokens=_ties_tokens(raw),
        parameters=check.texts("target_parameters"),
        notes=_notes(raw),
    )
    if problems:
        raise ValueError(f"{path}: this adapter can't be run:\n{bullet_list(problems)}")
    return config


def _advice(kind: Any) -> str:
    merge = "merge it into its model with PEFT (merge_and_unload) and load that"
    if kind == "TRAINABLE_TOKENS":
        return f"{merge}, or train LoRA with trainable_token_indices, which is read."
    if isinstance(kind, str) and ("PROMPT" in kind or "TUNING" in kind or kind == "CPT"):
        return "its trained prompt is no part of the weights; train a LoRA adapter instead."
    return f"{merge}."


def _unsupported(raw: Mapping[str, Any]) -> list[str]:
    """What changes the computation in a way that this version doesn't know."""
    problems = []
    for name, value in raw.items():
        if name in _INERT or name in _READ or value in (None, False, "", [], {}):
            continue
        hint = did_you_mean(name, [*_INERT, *_READ])
        text = f"{name} is {quoted(value)}; expected it unset: this version doesn't know it. {hint}"
        problems.append(text.rstrip())
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.match(start):
        problems.append(
            f"init_lora_weights is {quoted(start)}, which also changed the base weights; {_CONVERT}"
        )
    if raw.get("use_dora") is True and raw.get("lora_bias") is True:
        problems.append("use_dora and lora_bias are both set; expected one: PEFT refuses both")
    bias = raw.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        problems.append(f"bias is {quoted(bias)}; expected {one_of(['none', 'all', 'lora_only'])}")
    return problems


def _ties_tokens(raw: Mapping[str, Any]) -> bool:
    """PEFT ties the head's tokens to the embedding's unless both are named with other ids."""
    given = raw.get("trainable_token_indices")
    if not isinstance(given, Mapping):
        return True
    heads = [v for k, v in given.items() if str(k).endswith("lm_head")]
    embeds = [v for k, v in given.items() if str(k).endswith("embed_tokens")]
    return not heads or heads[:1] == embeds[:1]


def _notes(raw: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    base = raw.get("base_model_name_or_path")
    if isinstance(base, str) and _QUANTISED_NAME.search(base):
        notes.append(
            f"trained on {quoted(base)}, whose name says that its weights are quantised: the "
            "adapter also learnt to undo that rounding, which other weights don't have"
        )
    if raw.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is set, which PEFT itself takes back for Gemma 4's linears")
    return tuple(notes)


class _Fields:
    """Reads fields of a type, and lists those that are not of it."""

    def __init__(self, raw: Mapping[str, Any], problems: list[str]) -> None:
        self._raw = raw
        self._problems = problems

    def _refuse(self, name: str, value: Any, expected: str) -> None:
        self._problems.append(f"{name} is {quoted(value)}; expected {expected}")

    def flag(self, name: str) -> bool:
        value = self._raw.get(name)
        if value not in (None, True, False):
            self._refuse(name, value, "true or false")
        return value is True

    def text(self, name: str) -> str:
        value = self._raw.get(name)
        if value is not None and not isinstance(value, str):
            self._refuse(name, value, "a text")
        return value if isinstance(value, str) else ""

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._raw.get(name) or []
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self._refuse(name, value, "a list of texts")
            return ()
        return tuple(value)

    def number(
        self, name: str, default: float, *, integer: bool = False, low: float = -1e9,
        high: float = 1e9,
    ) -> float:  # fmt: skip
        value = self._raw.get(name, default)
        if not _is_number(value, integer) or not low <= value <= high:
            kind = "an integer" if integer else "a number"
            self._refuse(name, value, f"{kind} from {low:g} to {high:g}")
            return default
        return float(value)

    def patterns(self, name: str, *, integer: bool = False) -> Patterns:
        value = self._raw.get(name) or {}
        if not isinstance(value, Mapping) or len(value) > _MAX_PATTERNS:
            self._refuse(name, value, f"an object of at most {_MAX_PATTERNS} patterns")
            return ()
        if sum(bool(_REPETITION.search(pattern)) for pattern in value) > _MAX_REPEATING:
            self._refuse(name, value, f"at most {_MAX_REPEATING} patterns with repetitions")
            return ()
        found = []
        for pattern, entry in value.items():
            compiled, problem = _compiled(pattern)
            in_range = _is_number(entry, integer) and abs(entry) <= 1e9
            if compiled is None:
                self._problems.append(f"{name} has the pattern {quoted(pattern)}, {problem}")
            elif not in_range or (integer and not 1 <= entry <= _MAX_RANK):
                kind = f"an integer from 1 to {_MAX_RANK}" if integer else "a number"
                self._refuse(f"{name}[{quoted(pattern)}]", entry, kind)
            else:
                found.append((compiled, float(entry)))
        return tuple(found)

    def token_indices(self) -> dict[str, tuple[int, ...]]:
        name = "trainable_token_indices"
        value = self._raw.get(name)
        if value is None:
            return {}
        given = value if isinstance(value, Mapping) else {"embed_tokens": value}
        found = {}
        for module, ids in given.items():
            right = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
            if not right or len(set(ids)) != len(ids):
                self._refuse(name, ids, "a list of token ids, each once")
            else:
                found[str(module)] = tuple(ids)
        return found


def _is_number(value: Any, integer: bool) -> bool:
    return type(value) is int or (not integer and isinstance(value, float))


_REPETITION = re.compile(r"[*+{]")


def _compiled(pattern: str) -> tuple[re.Pattern[str] | None, str]:
    """A stranger's regular expression, or why it is not run: some take years on a short text."""
    if len(pattern) > _MAX_PATTERN or len(_REPETITION.findall(pattern)) > 3:
        return None, f"expected at most {_MAX_PATTERN} characters and 3 repetitions"
    if re.search(r"\)[*+{]", pattern) or re.search(r"\\\d", pattern):
        return None, "which repeats a group; expected only repeated characters, such as .*"
    try:
        return re.compile(rf"(.*\.)?({pattern})$"), ""
    except re.error as error:
        return None, f"which is no regular expression: {error}"
