"""LoRA adapters of PEFT: read, checked against the model, applied beside its weights."""

from gemloupe.adapters.adapter import Adapter
from gemloupe.adapters.report import AdapterReport, Change

__all__ = ["Adapter", "AdapterReport", "Change"]
