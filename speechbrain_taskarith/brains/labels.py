"""Characters or words as labels, where no tokenizer need be trained.

A trained SentencePiece processor can take their place: all have
`decode(list of lists of indices) -> list of transcripts`.
"""

import torch


class WordLabels:
    """Turns transcripts into word indices and back; index 0 is blank.

    For tasks of few words, where a model need not spell.

    Arguments
    ---------
    words : sequence of str
        All words, each once.

    Example
    -------
    >>> labels = WordLabels(["ONE", "TWO"])
    >>> labels.encode("TWO ONE")
    tensor([2, 1])
    >>> labels.decode([[2, 1], []])
    ['TWO ONE', '']
    >>> len(labels)
    3
    """

    #: What stands between the units of a transcript, and what they are.
    joint, unit = " ", "word"

    def __init__(self, words):
        if len(set(words)) != len(words):
            raise ValueError(f"{self.unit}s={words!r}: one occurs twice")
        self.units = list(words)
        self._index = {unit: n for n, unit in enumerate(self.units, start=1)}

    def __len__(self):
        return len(self.units) + 1

    def split(self, text):
        """Return the units of a transcript.

        Arguments
        ---------
        text : str
            The transcript.

        Returns
        -------
        sequence of str
            Words.
        """
        return text.split()

    def encode(self, text):
        """Return the labels of a transcript.

        Arguments
        ---------
        text : str
            The transcript.

        Returns
        -------
        torch.Tensor
            [labels], int64.

        Raises
        ------
        ValueError
            A unit that is none of the labels.
        """
        try:
            labels = [self._index[unit] for unit in self.split(text)]
        except KeyError as error:
            raise ValueError(
                f"{text!r}: the {self.unit} {error.args[0]!r} has no label; "
                f"there are {self.joint.join(self.units)!r}"
            ) from None
        return torch.tensor(labels).long()

    def decode(self, sequences):
        """Return transcripts.

        Arguments
        ---------
        sequences : list of list of int
            Labels; blanks have no text.

        Returns
        -------
        list of str
            Words separated by single spaces.

        Raises
        ------
        ValueError
            A label that is neither a unit's nor blank.
        """
        for label in (label for labels in sequences for label in labels):
            if not 0 <= label < len(self):
                raise ValueError(
                    f"label {label}: expected 0 to {len(self) - 1}, blank and "
                    f"the {self.unit}s; is the model's vocabulary another?"
                )
        texts = (
            self.joint.join(self.units[label - 1] for label in labels if label)
            for labels in sequences
        )
        return [" ".join(text.split()) for text in texts]


class CharacterLabels(WordLabels):
    """Turns transcripts into character indices and back; index 0 is blank.

    Arguments
    ---------
    characters : str
        All characters that occur, each once; a space separates words.

    Example
    -------
    >>> labels = CharacterLabels(" ENOTW")
    >>> labels.encode("TWO ONE")
    tensor([5, 6, 4, 1, 4, 3, 2])
    >>> labels.decode([[5, 6, 4], []])
    ['TWO', '']
    >>> len(labels)
    7
    """

    joint, unit = "", "character"

    def __init__(self, characters):
        super().__init__(characters)

    def split(self, text):
        """Return the characters of a transcript (see `WordLabels.split`)."""
        return text
