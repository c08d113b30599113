"""Long recordings, cut where they are quietest."""

import math

import torch

FRAME = 0.02  # seconds
AROUND = 5  # frames on either side that count for how quiet a place is


def cut_at_pauses(wave, sample_rate, longest):
    """Cut a long recording into parts, each at the quietest place there is.

    A place is as quiet as the fifth of a second around it. Parts follow one
    another without a gap; none is longer than `longest`, nor shorter than a
    quarter of it. Quiet need not be a pause: in noise, or in speech without
    pauses, a word may be cut.

    Arguments
    ---------
    wave : torch.Tensor
        [samples].
    sample_rate : int
        In Hz.
    longest : float
        Of a part, in seconds, from 1.

    Returns
    -------
    list of tuple of int
        First sample of each part, and the first behind it. A recording that is
        short enough is one part.

    Raises
    ------
    ValueError
        A `longest` below 1 s, or a wave of several channels.

    Example
    -------
    >>> speech = 0.1 * torch.randn(3 * 8000)
    >>> speech[12000:16000] = 0.0  # a pause at 1.5 s to 2 s
    >>> (first, second) = cut_at_pauses(speech, 8000, longest=2.0)
    >>> 12000 < first[1] < 16000, second == (first[1], 24000)
    (True, True)
    """
    if not 1 <= longest < math.inf:
        raise ValueError(f"longest {longest}: expected seconds, from 1")
    if wave.dim() != 1:
        raise ValueError(f"a wave of {tuple(wave.shape)}: expected [samples]")
    size = int(longest * sample_rate)
    frame = max(round(FRAME * sample_rate), 1)
    if len(wave) <= size:
        return [(0, len(wave))]
    whole = len(wave) // frame
    power = wave[: whole * frame].unflatten(0, (whole, frame)).double()
    quiet = torch.nn.functional.avg_pool1d(
        power.square().mean(1)[None],
        2 * AROUND + 1,
        stride=1,
        padding=AROUND,
        count_include_pad=False,
    )[0]
    cuts = [0]
    while (left := len(wave) - cuts[-1]) > size:
        most = min(size, left - size // 4)
        first = -(-(cuts[-1] + size // 2) // frame)
        behind = (cuts[-1] + most) // frame
        found = quiet[first:behind]
        # The last of the quietest: of fewer parts each says more.
        at = behind - 1 - int(found.flip(0).argmin())
        cuts.append(at * frame + frame // 2)
    return list(zip(cuts, [*cuts[1:], len(wave)]))
