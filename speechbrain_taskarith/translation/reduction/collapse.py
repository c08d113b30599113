"""Noticing that a CTC head has collapsed."""

import logging

logger = logging.getLogger(__name__)

# The first, then ever more seldom: a log is for reading.
_WARN_AT = {1, 10, 100, 1000, 10000, 100000}


class CollapseWatch:
    """Count batches whose CTC labels are of no use for shrinking.

    Arguments
    ---------
    min_ratio : float
        Frames for every segment below which a batch is noise: a new label at
        almost every frame, so nothing gets shorter.
    max_ratio : float
        Frames for every segment above which an utterance is all blanks.
    cut_evenly : bool
        Whether such utterances are cut evenly, for the message.

    Example
    -------
    >>> watch = CollapseWatch(1.05, 64.0, cut_evenly=True)
    >>> watch.update(segments=10, frames=50, collapsed=0, utterances=2)
    >>> watch.statistics()["compression"]
    5.0
    """

    def __init__(self, min_ratio, max_ratio, cut_evenly):
        if not 1 <= min_ratio < max_ratio:
            raise ValueError(
                f"min_ratio {min_ratio:g}, max_ratio {max_ratio:g}: expected "
                "1 <= min_ratio < max_ratio (frames for every segment)"
            )
        self.min_ratio, self.max_ratio = min_ratio, max_ratio
        self.cut_evenly = cut_evenly
        self._warned = {"blanks": 0, "noise": 0}
        self.reset()

    def reset(self):
        """Forget the statistics, e.g. at the end of an epoch."""
        self._segments = self._frames = self._utterances = 0
        self._blanks = self._noise = self._batches = 0

    def update(self, segments, frames, collapsed, utterances):
        """Count a batch, and warn where the head has collapsed.

        Arguments
        ---------
        segments : int
            Segments of all utterances together.
        frames : int
            Frames of all utterances together.
        collapsed : int
            Utterances with more than `max_ratio` frames a segment.
        utterances : int
            All utterances.
        """
        self._segments += segments
        self._frames += frames
        self._utterances += utterances
        self._batches += 1
        self._blanks += collapsed
        if collapsed:
            self._warn(
                "blanks",
                "%d of %d utterance(s) are almost nothing but blanks to the "
                "CTC head (more than %g frames a segment): %s. Usual early in "
                "training; later it means that the CTC loss is too weak or "
                "the learning rate too high.",
                collapsed,
                utterances,
                self.max_ratio,
                "they are cut evenly instead"
                if self.cut_evenly
                else "little is left of them (uniform=8 would cut them evenly)",
            )
        # Of single frames nothing can be said.
        elif frames < self.min_ratio * segments and frames > 2 * utterances:
            self._noise += 1
            self._warn(
                "noise",
                "the CTC head has a new label at almost every frame (%d "
                "segments of %d frames): nothing gets shorter. It is "
                "untrained, or its labels do not fit the encoder.",
                segments,
                frames,
            )

    def _warn(self, kind, message, *values):
        self._warned[kind] += 1
        if self._warned[kind] in _WARN_AT:
            logger.warning(message + " (time %d)", *values, self._warned[kind])

    def statistics(self):
        """Return what was seen since the last `reset`.

        Returns
        -------
        dict of str: float
            `compression`: frames for every segment; `blank_utterances`: how
            many collapsed into blanks, in %; `noise_batches`: how many
            batches into noise, in %.
        """
        return {
            "compression": self._frames / max(1, self._segments),
            "blank_utterances": 100.0 * self._blanks / max(1, self._utterances),
            "noise_batches": 100.0 * self._noise / max(1, self._batches),
        }
