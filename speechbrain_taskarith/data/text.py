"""Labels to text."""

from pathlib import Path


class LabelText:
    """Turn labels into text by a list of characters, phonemes or words.

    Arguments
    ---------
    labels : list of str or str or pathlib.Path
        The label of every index, blank included; or a text file with one a
        line.
    separator : str
        Put between labels: `""` for characters, `" "` for words.

    Example
    -------
    >>> LabelText(["<blank>", "one", "two"], separator=" ")([2, 1])
    'two one'
    """

    def __init__(self, labels, separator=""):
        if isinstance(labels, (str, Path)):
            text = Path(labels).read_text(encoding="utf-8")
            labels = text.removesuffix("\n").split("\n")
        self.labels = list(labels)
        self.separator = separator

    def __call__(self, tokens):
        """Return the text of a list of indices; a ValueError beyond the labels."""
        _check(tokens, range(len(self.labels)), "list of labels")
        return self.separator.join(self.labels[token] for token in tokens)


class SentencePieceText:
    """Turn labels into text by a SentencePiece model.

    Arguments
    ---------
    model_file : str or pathlib.Path
        The model, as SpeechBrain's tokenizer leaves it in the save folder.
    offset : int
        Subtracted from every index: 1 where a blank with the index 0 was put in
        front of the pieces.

    Example
    -------
    >>> SentencePieceText("5001_unigram.model")  # doctest: +SKIP
    """

    def __init__(self, model_file, offset=0):
        # speechbrain brings it.
        import sentencepiece as spm

        path = Path(model_file)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such SentencePiece model")
        self.processor = spm.SentencePieceProcessor(model_file=str(path))
        self.offset = offset

    def __call__(self, tokens):
        """See `LabelText.__call__`."""
        end = self.offset + self.processor.get_piece_size()
        _check(tokens, range(self.offset, end), "SentencePiece model")
        return self.processor.decode([token - self.offset for token in tokens])


def _check(tokens, known, what):
    for token in tokens:
        if token not in known:
            raise ValueError(
                f"label {token}: the {what} has {len(known)}; it does not "
                "belong to this model"
            )
