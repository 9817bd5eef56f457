"""Spectrograms with what a model attends to in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import quoted
from gemloupe.media.audio_tower import Sound
from gemloupe.media.mel import MelOptions, log_mel
from gemloupe.plot.media_attention import look
from gemloupe.plot.style import INK, colour_bar, new_axes

if TYPE_CHECKING:
    from gemloupe.run import Run

_HERTZ = (0, 250, 500, 1000, 2000, 4000, 8000)


def audio_attention(
    run: Run, layer: int, head: int, *, token: int = -1, audio: int = 0, ax: Any = None
) -> Any:
    """Paints what one head of one token attends to over a sound's log-mel spectrogram.

    Seconds go to the right, mel frequency upwards (labelled in Hz); each soft token colours its 40
    ms. `run` captured f"layers.{layer}.attn.pattern" [N, T, S]. `token`: index among the prompt's
    ids of the one that looks (-1 is the last). `audio`: which sound of the prompt. Returns axes.
    KeyError where the pattern was not captured; ValueError for a head, a token or a sound that
    there is not, and for soft tokens whose sound is not known.
    """
    sounds = [medium for medium in run.media if medium.kind == "audio"]
    if not -len(sounds) <= audio < len(sounds):
        raise ValueError(f"audio is {quoted(audio)}, but the prompt has {len(sounds)} sounds")
    sound = sounds[audio].content.source
    if not isinstance(sound, Sound):
        raise ValueError(
            f"audio {audio} was given as soft tokens of an unknown sound; pass the sound, or what "
            "model.encode_audio returned"
        )
    seen = look(run, layer, head, token)
    weights = seen.weights[sounds[audio].positions]
    options = sound.ears.mel
    frames = log_mel(sound.clip.samples, options)
    ax = new_axes(ax, (min(12.0, 4.0 + 0.8 * sound.times[-1, 1]), 3.2))
    step = options.hop_length / 16_000
    bands = options.feature_size
    low, high = np.percentile(frames, (5, 99.5)) if frames.size else (0.0, 1.0)
    ax.imshow(
        frames.T, origin="lower", aspect="auto", cmap="gray", interpolation="nearest",
        extent=(0, len(frames) * step, 0, bands), vmin=low, vmax=max(high, low + 1e-3),
    )  # fmt: skip
    most = float(weights.max()) or 1.0
    # What is not attended to shows the spectrogram; what is attended to most is still seen through.
    shown = ax.imshow(
        weights[None], origin="lower", aspect="auto", cmap="plasma", interpolation="nearest",
        extent=(0, float(sound.times[-1, 1]), 0, bands), vmin=0, vmax=most,
        alpha=(0.05 + 0.6 * weights / most)[None],
    )  # fmt: skip
    ax.set_xlim(0, float(sound.times[-1, 1]))
    ax.set_ylim(0, bands)
    hertz = [f for f in _HERTZ if options.min_frequency <= f <= options.max_frequency]
    ax.set_yticks([_band(f, options) for f in hertz], [str(f) for f in hertz])
    ax.set_xlabel("seconds", color=INK)
    ax.set_ylabel("Hz (mel scale)", color=INK)
    ax.set_title(f"{seen.title} gives this sound {weights.sum():.0%}", color=INK, fontsize=9)
    colour_bar(shown, ax, "attention")
    return ax


def _band(hertz: float, options: MelOptions) -> float:
    """Where a frequency stands among the bands, whose corners are evenly spaced in mel (HTK)."""
    low, high, at = (
        np.log1p(f / 700.0) for f in (options.min_frequency, options.max_frequency, hertz)
    )
    # Band i has its peak at corner i + 1, and is drawn from i to i + 1.
    corner = (at - low) / (high - low) * (options.feature_size + 1)
    return float(np.clip(corner - 0.5, 0, options.feature_size))
