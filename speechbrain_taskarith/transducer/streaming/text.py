"""Labels to text, as `data` has it; a room's stub names its own files only."""

from speechbrain_taskarith.data.text import LabelText, SentencePieceText

__all__ = ["LabelText", "SentencePieceText"]
