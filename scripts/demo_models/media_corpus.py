"""Draws the pictures, sounds and videos that demo:media learns from, deterministically by seed.

A `MediaSample` is one medium with questions about it and their answers. What a picture, a sound or
a video is made of is its key, and one key in ten is held out (`corpus.is_held_out`), in all
questions: of pictures colour, kind and place of each shape, of sounds the pitches, of videos shape
and event.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from corpus import is_held_out
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 40),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "pink": (250, 130, 190),
}
SHAPES = ("circle", "square", "triangle")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the middle", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
CENTRES = ((0.16, 0.28), (0.44, 0.56), (0.72, 0.84))
"""Of a row's or column's shapes, as parts of the picture's side."""
RATIOS = ((1, 1), (1, 1), (4, 3), (4, 3), (3, 4), (3, 2), (16, 9))
"""Width to height; those of one batch are equal, so that it needs no padding."""

PITCHES = {"low": (180, 320), "middle": (600, 900), "high": (1800, 2800)}
"""Hertz, from and to."""
COUNTS = ("No", "One", "Two", "Three", "Four", "Five")
SAMPLING_RATE = 16_000

MOVES = {"to the right": (1, 0), "to the left": (-1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES = 4

DESCRIBE = {
    "image": ("Describe the picture.", "What is in the picture?", "What do you see?"),
    "audio": ("Describe the sound.", "What do you hear?"),
    "video": ("Describe the video.", "What happens?"),
}
# What gl.transcribe asks, in the words of Gemma 4's model card.
TRANSCRIBE = (
    "Transcribe the following speech segment in its original language into the same language text. "
    "Follow these specific instructions for formatting the answer:\n"
    "* Only output the transcription, with no newlines.\n"
    "* When transcribing numbers, write the digits, i.e. write 1.7 and not one point seven, and "
    "write 3 instead of three."
)


@dataclass(frozen=True)
class MediaSample:
    kind: str
    """image, audio or video."""
    key: str
    media: Any
    """A PIL picture; float32 samples at 16 kHz; or a list of PIL pictures."""
    turns: list[tuple[str, str, str]]
    """Task, question and answer."""
    interval: int = 1
    """Seconds between the frames of a video."""
    marks: tuple[Any, ...] = ()
    """The shapes of a picture; the beeps of a sound: from, to (in seconds) and pitch."""


@dataclass(frozen=True)
class Shape:
    """What is drawn: centre and radius in parts of width, height and the shorter side."""

    kind: str
    colour: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def key(self) -> str:
        return f"{self.name} {self.place}"

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        reach = self.radius * min(width, height)
        x, y = self.x * width, self.y * height
        return x - reach, y - reach, x + reach, y + reach


def draw_shape(
    rng: random.Random, dark: bool, kinds: tuple[str, ...] = SHAPES, largest: float = 0.15
) -> Shape:
    """A shape that is seen on a dark or on a light ground."""
    colour = rng.choice([c for c in COLOURS if c != ("black" if dark else "white")])
    row, column = rng.randrange(3), rng.randrange(3)
    x, y = rng.uniform(*CENTRES[column]), rng.uniform(*CENTRES[row])
    return Shape(rng.choice(kinds), colour, row, column, x, y, rng.uniform(0.1, largest))


def shade(rng: random.Random, colour: tuple[int, int, int], by: int = 15) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in colour)


def ground(rng: random.Random, dark: bool) -> tuple[int, ...]:
    if dark:
        return shade(rng, (60, 60, 60), 20)
    return (255, 255, 255) if rng.random() < 0.4 else shade(rng, (225, 225, 225), 20)


def paint(
    size: tuple[int, int], back: tuple[int, ...], shapes: list[tuple[Shape, tuple[int, ...]]]
) -> Image.Image:
    """A picture of this width and height with the shapes in their colours."""
    picture = Image.new("RGB", size, back)
    pen = ImageDraw.Draw(picture)
    for shape, fill in shapes:
        left, top, right, bottom = shape.box(*size)
        if shape.kind == "circle":
            pen.ellipse((left, top, right, bottom), fill=fill)
        elif shape.kind == "square":
            pen.rectangle((left, top, right, bottom), fill=fill)
        else:
            pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=fill)
    return picture


def box_answer(shape: Shape, size: tuple[int, int]) -> str:
    """Gemma's form: thousandths (here whole hundredths), y before x."""
    left, top, right, bottom = shape.box(*size)
    numbers = (top / size[1], left / size[0], bottom / size[1], right / size[0])
    thousandths = [10 * min(100, max(0, round(100 * n))) for n in numbers]
    return f'[{{"box_2d": {thousandths}, "label": "{shape.kind}"}}]'


def caption(shapes: list[Shape]) -> str:
    if not shapes:
        return "An empty picture."
    ordered = sorted(shapes, key=lambda s: (s.row, s.column))
    return "A " + " and a ".join(s.key for s in ordered) + "."


def picture_size(rng: random.Random, ratio: tuple[int, int]) -> tuple[int, int]:
    factor = rng.randint(64, 320) / max(ratio)
    unit = max(1, round(factor))
    return ratio[0] * unit, ratio[1] * unit


def image(
    rng: random.Random, ratio: tuple[int, int], easy: bool = False, most: int = 2
) -> MediaSample:
    """A picture with up to `most` shapes; an easy one has one, and no question about its box."""
    size, dark = picture_size(rng, ratio), rng.random() < 0.25
    shapes: list[Shape] = []
    count = 1 if easy else rng.choices((0, 1, 2), (5, 55, 40 * (most > 1)))[0]
    while len(shapes) < count:
        kinds = tuple(k for k in SHAPES if k not in [s.kind for s in shapes])
        new = draw_shape(rng, dark, kinds, 0.2 if count == 1 else 0.15)
        if all((new.row, new.column) != (s.row, s.column) for s in shapes) and all(
            new.colour != s.colour for s in shapes
        ):
            shapes.append(new)
    fills = [shade(rng, COLOURS[s.colour]) for s in shapes]
    picture = paint(size, ground(rng, dark), list(zip(shapes, fills, strict=True)))
    turns = [("describe", rng.choice(DESCRIBE["image"]), caption(shapes))]
    if shapes:
        s = rng.choice(shapes)
        turns += [
            ("colour", f"What colour is the {s.kind}?", f"It is {s.colour}."),
            ("place", f"Where is the {s.kind}?", f"{s.place.capitalize()}."),
            ("shape", f"What is {s.colour}?", f"The {s.kind}."),
        ]
    if shapes and not easy:
        turns.append(("box", f"Detect the {s.kind}.", box_answer(s, size)))
    key = "; ".join(s.key for s in shapes)
    return MediaSample("image", key, picture, turns, marks=tuple(shapes))


def beep(rng: random.Random, pitch: str, seconds: float) -> np.ndarray:
    """A tone with a soft beginning and end, and sometimes an overtone."""
    times = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    hertz = math.exp(rng.uniform(*map(math.log, PITCHES[pitch])))
    wave = np.sin(2 * np.pi * hertz * times) + rng.choice((0.0, 0.2)) * np.sin(
        4 * np.pi * hertz * times
    )
    fade = np.minimum(1, np.minimum(times, times[::-1]) / 0.01)
    return wave * fade


def tones(
    rng: random.Random, pitches: list[str]
) -> tuple[np.ndarray, tuple[tuple[float, float, str], ...]]:
    """The beeps one after the other with pauses, float32 at 16 kHz, and when which sounds."""
    parts = [np.zeros(int(rng.uniform(0.05, 0.4) * SAMPLING_RATE))]
    marks = []
    for pitch in pitches:
        begin = sum(map(len, parts)) / SAMPLING_RATE
        parts.append(beep(rng, pitch, rng.uniform(0.15, 0.3)))
        marks.append((begin, begin + len(parts[-1]) / SAMPLING_RATE, pitch))
        parts.append(np.zeros(int(rng.uniform(0.12, 0.3) * SAMPLING_RATE)))
    if not pitches:
        parts.append(np.zeros(int(rng.uniform(0.2, 1.5) * SAMPLING_RATE)))
    sound = np.concatenate(parts) * math.exp(rng.uniform(math.log(0.1), math.log(0.9)))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(sound))
    return (sound + rng.choice((0.0, 0.001, 0.004)) * noise).astype(np.float32), tuple(marks)


def audio(rng: random.Random, easy: bool = False) -> MediaSample:
    """Up to five beeps, or nothing; an easy sound has one to three."""
    count = rng.randint(1, 3) if easy else rng.choices(range(6), (3, 15, 20, 22, 20, 20))[0]
    pitches = [rng.choice(list(PITCHES)) for _ in range(count)]
    if rng.random() < 0.15:  # all alike, which chance makes rare
        pitches = pitches[:1] * count
    if pitches:
        beeps = f"{COUNTS[count]} beep{'s' * (count > 1)}"
        turns = [
            ("describe", rng.choice(DESCRIBE["audio"]), f"{beeps}: {', '.join(pitches)}."),
            ("count", "How many beeps are there?", f"{COUNTS[count]}."),
            ("transcribe", "Transcribe the sound.", " ".join(pitches)),
        ]
    else:
        turns = [
            ("describe", rng.choice(DESCRIBE["audio"]), "Silence."),
            ("count", "How many beeps are there?", "No beeps."),
        ]
    sound, marks = tones(rng, pitches)
    return MediaSample("audio", " ".join(pitches), sound, turns, marks=marks)


def video(rng: random.Random, ratio: tuple[int, int]) -> MediaSample:
    """A shape that moves, turns another colour, or stays."""
    size, dark = picture_size(rng, ratio), rng.random() < 0.25
    back = ground(rng, dark)
    s = draw_shape(rng, dark)
    interval = rng.choice((1, 1, 2))
    what = rng.choices(("move", "turn", "stay"), (55, 35, 10))[0]
    fills = [shade(rng, COLOURS[s.colour])] * FRAMES
    places = [(s.x, s.y)] * FRAMES
    turns = []
    if what == "move":
        way = rng.choice(list(MOVES))
        dx, dy = MOVES[way]
        begin, end = rng.uniform(0.16, 0.3), rng.uniform(0.7, 0.84)
        path = [begin + (end - begin) * i / (FRAMES - 1) for i in range(FRAMES)]
        path = path if dx + dy > 0 else [1 - p for p in path]
        places = [(p if dx else s.x, p if dy else s.y) for p in path]
        happens, detail = f"moves {way}", way
    elif what == "turn":
        new = rng.choice([c for c in COLOURS if c not in (s.colour, "black" if dark else "white")])
        at = rng.randrange(1, FRAMES)
        fills = fills[:at] + [shade(rng, COLOURS[new])] * (FRAMES - at)
        happens, detail = f"turns {new}", new
        seconds = at * interval
        turns = [("when", f"When does it turn {new}?", f"At 00:{seconds:02d}.")]
    else:
        happens, detail = "stays where it is", "stays"
    frames = [
        paint(size, back, [(Shape(s.kind, s.colour, s.row, s.column, x, y, s.radius), fill)])
        for (x, y), fill in zip(places, fills, strict=True)
    ]
    answer = f"A {s.name} {happens}."
    turns.insert(0, ("describe", rng.choice(DESCRIBE["video"]), answer))
    return MediaSample("video", f"{s.name} {detail}", frames, turns, interval)


def is_kept(sample: MediaSample, held_out: bool) -> bool:
    """Whether a sample belongs to training, or to what is held out from it."""
    return any(is_held_out(key) for key in sample.key.split("; ") if key) == held_out


def stream(
    seed: int,
    kind: str,
    held_out: bool = False,
    ratio: tuple[int, int] | None = None,
    easy: bool = False,
    most: int = 2,
) -> Iterator[MediaSample]:
    """Endless samples of a kind. Pictures have the `ratio`, or each its own."""
    rng = random.Random(f"{seed} {kind} {held_out} {ratio}")
    while True:
        shape = ratio or rng.choice(RATIOS)
        if kind == "image":
            sample = image(rng, shape, easy, most)
        else:
            sample = audio(rng, easy) if kind == "audio" else video(rng, shape)
        if is_kept(sample, held_out):
            yield sample
