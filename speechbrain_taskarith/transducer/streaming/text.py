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
        """Turn a label sequence into text.

        Arguments
        ---------
        tokens : list of int
            Indices.

        Returns
        -------
        str
            The text.

        Raises
        ------
        ValueError
            An index beyond the list.
        """
        for token in tokens:
            if not 0 <= token < len(self.labels):
                raise ValueError(
                    f"label {token}: the list has {len(self.labels)} labels; "
                    "it does not belong to this model"
                )
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
        size = self.processor.get_piece_size()
        pieces = [token - self.offset for token in tokens]
        for token, piece in zip(tokens, pieces):
            if not 0 <= piece < size:
                raise ValueError(
                    f"label {token}: the SentencePiece model has {size} "
                    "pieces; it does not belong to this model"
                )
        return self.processor.decode(pieces)
