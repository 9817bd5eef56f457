"""Pictures with what a model attends to in them, and with the boxes that it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloupe.errors import quoted
from gemloupe.media.boxes import Box, parse_boxes
from gemloupe.media.images import Image, open_picture
from gemloupe.media.videos import Video
from gemloupe.plot.media_attention import look
from gemloupe.plot.style import COLOURS, INK, colour_bar, new_axes

if TYPE_CHECKING:
    from gemloupe.run import Run


def image_attention(
    run: Run, layer: int, head: int, *, token: int = -1, image: int = 0, ax: Any = None
) -> Any:
    """Paints what one head of one token attends to over a picture, and returns the axes.

    `run` captured f"layers.{layer}.attn.pattern" [N, T, S]. `token`: index among the prompt's ids
    of the one that looks (-1 is the last). `image`: which picture, frames of videos counted.
    KeyError where the pattern was not captured; ValueError for a head, a token or a picture that
    there is not, and for soft tokens whose picture is not known.
    """
    pictures = _pictures(run)
    if not -len(pictures) <= image < len(pictures):
        raise ValueError(f"image is {quoted(image)}, but the prompt has {len(pictures)} pictures")
    picture, positions = pictures[image]
    if picture is None:
        raise ValueError(
            f"image {image} was given as soft tokens of an unknown picture; pass the picture, or "
            "what model.encode_image returned"
        )
    seen = look(run, layer, head, token)
    weights = seen.weights[positions]
    ax = new_axes(ax, _size(picture.width, picture.height))
    extent = (0, picture.width, picture.height, 0)
    ax.imshow(_gray(picture.pixels), extent=extent, cmap="gray", vmin=0, vmax=255)
    grid = weights.reshape(picture.grid)
    most = float(grid.max()) or 1.0
    # What is not attended to shows the picture, what is attended to most covers it.
    shown = ax.imshow(
        grid, extent=extent, cmap="plasma", vmin=0, vmax=most, alpha=0.05 + 0.85 * grid / most
    )
    _bare(ax)
    ax.set_title(f"{seen.title} gives this picture {weights.sum():.0%}", color=INK, fontsize=9)
    colour_bar(shown, ax, "attention")
    return ax


def boxes(picture: Any, reply: str | Sequence[Box], *, ax: Any = None) -> Any:
    """Draws the boxes of a reply over a picture, and returns the axes.

    `picture`: as `model.encode_image` takes it. `reply`: the model's text, or boxes of
    `gl.parse_boxes`. ValueError where the text has none.
    """
    found = parse_boxes(reply) if isinstance(reply, str) else list(reply)
    if not found:
        raise ValueError(f'no "box_2d" in the reply {quoted(reply)}; ask for boxes as JSON')
    opened = open_picture(picture, "picture")
    width, height = opened.size
    ax = new_axes(ax, _size(width, height))
    from matplotlib.patches import Rectangle

    ax.imshow(np.asarray(opened), extent=(0, width, height, 0))
    for index, box in enumerate(found):
        colour = COLOURS[index % len(COLOURS)]
        left, top, right, bottom = box.pixels(width, height)
        ax.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, lw=2)
        )
        if box.label:
            ax.text(
                left, top, box.label.replace("$", "\\$"), color="white", fontsize=8, va="bottom",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
    _bare(ax)
    return ax


def _pictures(run: Run) -> list[tuple[Image | None, np.ndarray]]:
    """Every picture of the prompt with the rows of its soft tokens; None where it is not known."""
    found: list[tuple[Image | None, np.ndarray]] = []
    for medium in run.media:
        source = medium.content.source
        if medium.kind == "video" and isinstance(source, Video):
            found += list(zip(source.frames, medium.blocks, strict=True))
        elif medium.kind == "image":
            found.append((source if isinstance(source, Image) else None, medium.positions))
    return found


def _gray(pixels: np.ndarray) -> np.ndarray:
    """Brightness (ITU-R 601), lifted so that dark parts stay visible under colours."""
    return 64 + 0.75 * (pixels @ np.array([0.299, 0.587, 0.114]))


def _size(width: int, height: int) -> tuple[float, float]:
    longest = max(width, height)
    return max(2.5, 5.5 * width / longest) + 1.0, max(2.0, 5.5 * height / longest)


def _bare(ax: Any) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
