"""Text, code and PDF files in one prompt, with a span of positions for each."""

from gemloupe.documents.packing import Document, LeftOut, Pack, pack

__all__ = ["Document", "LeftOut", "Pack", "pack"]
