"""Characters or words as labels, where no tokenizer need be trained.

Authors
 * speechbrain_taskarith contributors 2026
"""

import torch


class CharacterLabels:
    """Turns transcripts into character indices and back; index 0 is blank.

    A trained SentencePiece processor can take its place: both have
    `decode(list of lists of indices) -> list of transcripts`.

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

    def __init__(self, characters):
        if len(set(characters)) != len(characters):
            raise ValueError(f"characters={characters!r}: one occurs twice")
        self.characters = characters
        self._index = {c: n for n, c in enumerate(characters, start=1)}

    def __len__(self):
        return len(self.characters) + 1

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
            A character that is none of the labels.
        """
        try:
            return torch.tensor([self._index[c] for c in text]).long()
        except KeyError as error:
            raise ValueError(
                f"{text!r}: the character {error.args[0]!r} has no label; "
                f"there are {self.characters!r}"
            ) from None

    def decode(self, sequences):
        """Return transcripts.

        Arguments
        ---------
        sequences : list of list of int
            Labels without blanks.

        Returns
        -------
        list of str
            Words separated by single spaces.
        """
        return [
            " ".join("".join(self.characters[i - 1] for i in labels).split())
            for labels in sequences
        ]


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

    def __init__(self, words):
        if len(set(words)) != len(words):
            raise ValueError(f"words={list(words)}: one occurs twice")
        self.words = list(words)
        self._index = {word: n for n, word in enumerate(self.words, start=1)}

    def __len__(self):
        return len(self.words) + 1

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
            A word that is none of the labels.
        """
        try:
            return torch.tensor([self._index[w] for w in text.split()]).long()
        except KeyError as error:
            raise ValueError(
                f"{text!r}: the word {error.args[0]!r} has no label; there "
                f"are {', '.join(self.words)}"
            ) from None

    def decode(self, sequences):
        """Return transcripts.

        Arguments
        ---------
        sequences : list of list of int
            Labels without blanks.

        Returns
        -------
        list of str
            Words separated by single spaces.
        """
        return [
            " ".join(self.words[i - 1] for i in labels) for labels in sequences
        ]
