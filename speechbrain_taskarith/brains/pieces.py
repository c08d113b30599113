"""SentencePieces as labels, after reserved indices."""

import torch


class PieceLabels:
    """Turns text into SentencePiece indices and back.

    Like `CharacterLabels`, with a trained tokenizer.

    Arguments
    ---------
    processor : sentencepiece.SentencePieceProcessor
        A trained one: `.sp` of SpeechBrain's `SentencePiece`.
    reserved : sequence of str
        Labels before the pieces: `["<blank>"]` for a CTC head, none for a
        decoder whose beginning and end tokens are among the pieces.

    Example
    -------
    >>> import io
    >>> import sentencepiece
    >>> trained = io.BytesIO()
    >>> sentencepiece.SentencePieceTrainer.train(
    ...     sentence_iterator=iter(["good day", "a day"]),
    ...     model_writer=trained,
    ...     model_type="char",
    ...     vocab_size=10,
    ...     minloglevel=2,
    ... )
    >>> processor = sentencepiece.SentencePieceProcessor(
    ...     model_proto=trained.getvalue()
    ... )
    >>> labels = PieceLabels(processor, ["<blank>"])
    >>> indices = labels.encode("good day")
    >>> labels.decode([indices.tolist(), []])
    ['good day', '']
    >>> len(labels) == len(labels.pieces) == len(processor) + 1
    True
    """

    def __init__(self, processor, reserved=()):
        self.processor, self.reserved = processor, list(reserved)

    def __len__(self):
        return len(self.processor) + len(self.reserved)

    @property
    def pieces(self):
        """All labels as text, in order."""
        count = len(self.processor)
        own = [self.processor.id_to_piece(index) for index in range(count)]
        return [*self.reserved, *own]

    def encode(self, text):
        """Return the labels of a text.

        Arguments
        ---------
        text : str
            The text.

        Returns
        -------
        torch.Tensor
            [labels], int64.
        """
        pieces = torch.tensor(self.processor.encode_as_ids(text)).long()
        return pieces + len(self.reserved)

    def decode(self, sequences):
        """Return texts.

        Arguments
        ---------
        sequences : list of list of int
            Labels, none of them reserved.

        Returns
        -------
        list of str
            One for each.

        Raises
        ------
        ValueError
            A label without a piece.
        """
        first = len(self.reserved)
        for labels in sequences:
            for label in labels:
                if not first <= label < len(self):
                    raise ValueError(
                        f"label {label}: expected {first} to {len(self) - 1}, "
                        "the pieces; was another tokenizer trained?"
                    )
        return [
            self.processor.decode_ids([label - first for label in labels])
            for labels in sequences
        ]
