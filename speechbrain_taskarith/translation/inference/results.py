"""What a translator returns."""

from dataclasses import asdict, dataclass, field

SENTENCE = 10  # seconds that it takes, at most


@dataclass(frozen=True)
class TranslatedSegment:
    """A span of speech that became one vector of the textual encoder.

    Arguments
    ---------
    start, end : float
        In seconds, see `Translation`.
    transcript : str or None
        The label that the CTC head gave the span, as text; empty for a blank.
        None: the head has no labels.

    Example
    -------
    >>> TranslatedSegment(0.2, 0.26, "dog").transcript
    'dog'
    """

    start: float
    end: float
    transcript: str | None = None


@dataclass(frozen=True)
class Translation:
    """One utterance, translated.

    A segment is a run of frames with the same best label of the CTC head, of
    blanks, too. Times are those of the encoder's frames, spread evenly over the
    recording. They say where the head showed a label, right to about a frame:
    a CTC head shows it for a frame or two, often late, and an encoder reads
    beyond its frame. They are no boundaries of words, and say nothing about
    the words of the translation.

    Arguments
    ---------
    text : str
        The translation; empty where the decoder ended at once.
    segments : list of TranslatedSegment
        In order. Empty where the model does not shrink.
    transcript : str or None
        What the CTC head read, of the whole utterance.
    seconds : float
        Duration.
    target : str or None
        Language of the text, where the model names it.
    cut : bool
        True: it was as long as the search allows, and its end is missing.

    Example
    -------
    >>> found = Translation(
    ...     "chien", [TranslatedSegment(0.2, 0.26, "dog")], "dog", 0.5, "fr"
    ... )
    >>> found.as_dict()["segments"]
    [{'start': 0.2, 'end': 0.26, 'transcript': 'dog'}]
    >>> found.doubt
    """

    text: str
    segments: list = field(default_factory=list)
    transcript: str | None = None
    seconds: float = 0.0
    target: str | None = None
    cut: bool = False

    @property
    def doubt(self):
        """What is to be doubted about the text, None if nothing is."""
        if not self.text:
            return "the translation is empty; is there speech in it?"
        if self.cut:
            doubt = (
                "the translation lacks its end: it is as long as the model's "
                "search allows (least_steps or greedy_tokens)"
            )
            if self.seconds <= SENTENCE:
                return doubt
            return (
                f"{doubt}. A model of sentences wants sentences: cut the "
                f"recording (longest={SENTENCE})"
            )
        if self.transcript == "":
            return "the CTC head read nothing; is there speech in it?"
        return None

    @classmethod
    def joined(cls, parts):
        """Return the translation of a recording from those of its parts.

        Arguments
        ---------
        parts : sequence of Translation
            In order, with the times of the whole recording.

        Returns
        -------
        Translation
            `cut` if one of them is.
        """
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        read = [part.transcript for part in parts]
        return cls(
            " ".join(part.text for part in parts if part.text),
            [segment for part in parts for segment in part.segments],
            None if None in read else " ".join(filter(None, read)),
            sum(part.seconds for part in parts),
            parts[0].target,
            any(part.cut for part in parts),
        )

    def as_dict(self):
        """Return it as plain types, for JSON.

        Returns
        -------
        dict
            Every field under its name.
        """
        return asdict(self)
