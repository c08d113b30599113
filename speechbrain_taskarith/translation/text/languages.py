"""Many target languages: the beginning token says which."""

import torch


class TargetLanguages:
    """The beginning token of each target language.

    The decoder's first input token names the language; `target_bos` begins
    with it, and a search is given it as its `bos_index`.

    Arguments
    ---------
    tokens : dict of str: int
        The token of each language.

    Raises
    ------
    ValueError
        No language, or two with one token.

    Example
    -------
    >>> languages = TargetLanguages({"de": 5, "fr": 6})
    >>> languages.bos(["fr", "de"])
    tensor([6, 5])
    >>> languages.bos("nl")
    Traceback (most recent call last):
        ...
    ValueError: target language 'nl' is unknown; known are de, fr
    """

    def __init__(self, tokens):
        self.tokens = {str(name): int(i) for name, i in dict(tokens).items()}
        if not self.tokens or len(set(self.tokens.values())) < len(self.tokens):
            raise ValueError(
                f"languages: {dict(tokens)}; expected a token of its own for "
                "each, such as {de: 5, fr: 6}"
            )

    @classmethod
    def for_pieces(cls, pieces, languages, form="<{}>"):
        """Find the languages' tokens among the labels of a decoder.

        Arguments
        ---------
        pieces : sequence of str
            All labels in order; `PieceLabels` has them. SentencePiece takes
            such tokens as `user_defined_symbols`.
        languages : sequence of str
            Which to find.
        form : str
            A language's token, `{}` being its name.

        Returns
        -------
        TargetLanguages
            With these languages.

        Raises
        ------
        ValueError
            A language without a token.

        Example
        -------
        >>> TargetLanguages.for_pieces(["a", "<de>"], ["de"]).tokens
        {'de': 1}
        """
        places = {piece: index for index, piece in enumerate(pieces)}
        tokens = {name: form.format(name) for name in languages}
        missing = [token for token in tokens.values() if token not in places]
        if missing:
            raise ValueError(
                f"no piece {', '.join(missing)}; train the SentencePiece with "
                f"user_defined_symbols={','.join(tokens.values())}"
            )
        return cls({name: places[token] for name, token in tokens.items()})

    def bos(self, languages):
        """Return the beginning token of a language, or of many.

        Arguments
        ---------
        languages : str or sequence of str
            One, or one for each utterance.

        Returns
        -------
        int or torch.Tensor
            The token; of a sequence [B], int64.

        Raises
        ------
        ValueError
            An unknown language.
        """
        if not isinstance(languages, str):
            return torch.tensor([self.bos(name) for name in languages]).long()
        if languages not in self.tokens:
            raise ValueError(
                f"target language {languages!r} is unknown; known are "
                f"{', '.join(self.tokens)}"
            )
        return self.tokens[languages]
