"""Images, sounds and videos: from what a caller passes to soft tokens at their positions."""

from gemloupe.media.content import KINDS, Content, Medium, SoftTokens
from gemloupe.media.placing import blocks, engine_input, media_parts
from gemloupe.media.reader import Reader
from gemloupe.media.spans import Media, Place

__all__ = [
    "KINDS",
    "Content",
    "Media",
    "Medium",
    "Place",
    "Reader",
    "SoftTokens",
    "blocks",
    "engine_input",
    "media_parts",
]
