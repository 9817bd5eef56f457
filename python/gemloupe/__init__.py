"""gemloupe runs the Gemma 4 family on CPUs, fast, and lets you see everything inside.

import gemloupe as gl

model = gl.load("demo:edge")
print(model.chat("What is 27 + 45?"))
"""

from gemloupe import edits, plot
from gemloupe._core import __version__
from gemloupe.activation_file import Activations, open_activations
from gemloupe.activation_recorder import record
from gemloupe.analysis import (
    attribution,
    budget_sweep,
    directional,
    induction_scores,
    logit_lens,
    patching_grid,
    steering_vector,
)
from gemloupe.batch import run_batch
from gemloupe.cache import KvCache
from gemloupe.capturing import at
from gemloupe.comparison import compare, record_reference
from gemloupe.conversion import convert
from gemloupe.documents import Pack, pack
from gemloupe.drafter import PromptLookup
from gemloupe.help_pages import help
from gemloupe.hooks import HookPoint, before
from gemloupe.inspect import estimate
from gemloupe.media.boxes import Box, parse_boxes
from gemloupe.media.videos import video
from gemloupe.model import Model, load
from gemloupe.output import Output
from gemloupe.perplexity import Divergence, Perplexity, kl, perplexity
from gemloupe.prompt import Prompt
from gemloupe.router_trace import RouterTrace
from gemloupe.run import Run
from gemloupe.stream import Piece, Stream
from gemloupe.transcription import Transcript, transcribe


def hook_points(model: Model) -> dict[str, HookPoint]:
    """Every hook point of a model by name, in model order: what `run(capture=...)` takes.

    Those of its towers ("vision.…", "audio.…") come first.
    """
    from gemloupe import hooks
    from gemloupe.media.audio_tower import read_ears
    from gemloupe.media.vision_hooks import vision_points

    seen = {} if model.vision is None else vision_points(model.vision.config)
    ears = read_ears(model.checkpoint)
    heard = {} if ears is None else hooks.hook_points(ears.config)
    return {**seen, **heard, **hooks.hook_points(model.config.text)}


__all__ = [
    "Activations",
    "Box",
    "Divergence",
    "HookPoint",
    "KvCache",
    "Model",
    "Output",
    "Pack",
    "Perplexity",
    "Piece",
    "Prompt",
    "PromptLookup",
    "RouterTrace",
    "Run",
    "Stream",
    "Transcript",
    "__version__",
    "at",
    "attribution",
    "before",
    "budget_sweep",
    "compare",
    "convert",
    "directional",
    "edits",
    "estimate",
    "help",
    "hook_points",
    "induction_scores",
    "kl",
    "load",
    "logit_lens",
    "open_activations",
    "pack",
    "parse_boxes",
    "patching_grid",
    "perplexity",
    "plot",
    "record",
    "record_reference",
    "run_batch",
    "steering_vector",
    "transcribe",
    "video",
]
