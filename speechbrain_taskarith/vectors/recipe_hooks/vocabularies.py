"""Do a base and the run that starts from it mean the same tokens by a row?

A recipe makes its label encoder or tokenizer from each run's own data. Under
another one the base's output layer would be read with its rows exchanged.
"""

import itertools
from pathlib import Path

from speechbrain.dataio.encoder import CategoricalEncoder

from speechbrain_taskarith.vectors.states.vocabulary import read_vocabulary

# What recipes write into their save folders: label encoders, SentencePiece.
_FILES = ("*encoder*.txt", "*.vocab", "*.model")


def check_same_tokens(base, folder, recoverables):
    """Raise ValueError if a run's tokens are not its base's.

    Arguments
    ---------
    base : pathlib.Path
        The base's `CKPT+` folder; its save folder is the one around it.
    folder : pathlib.Path
        The run's save folder.
    recoverables : dict
        The run's; encoders among them are compared with the base's.
    """
    base, folder = Path(base).resolve(), Path(folder)
    for name, encoder in recoverables.items():
        if not isinstance(encoder, CategoricalEncoder) or not len(encoder):
            continue
        rows = [encoder.ind2lab[row] for row in sorted(encoder.ind2lab)]
        theirs = _stored_encoder(base, name)
        if theirs is not None:
            _compare(*theirs, f"the encoder {name!r} in memory", rows)
    if base.parent == folder.resolve():
        return
    for one, other in _pairs(base.parent, folder):
        if one.read_bytes() != other.read_bytes():
            _compare(one, _tokens(one), other, _tokens(other))


def _stored_encoder(base, name):
    """Return path and tokens of an encoder of the base, or None."""
    texts = list(base.parent.glob(_FILES[0]))
    for path in [base / f"{name}.ckpt", *(texts if len(texts) == 1 else ())]:
        # Some recipes keep an encoder that is empty.
        if path.exists() and (tokens := _tokens(path)):
            return path, tokens
    return None


def _pairs(base, folder):
    """Yield the files of two save folders that have one purpose."""
    for pattern in _FILES:
        ones, others = sorted(base.glob(pattern)), sorted(folder.glob(pattern))
        if len(ones) == len(others) == 1:
            yield ones[0], others[0]
            continue
        for one in ones:
            if (other := folder / one.name).exists():
                yield one, other


def _tokens(path):
    if path.suffix != ".model":
        try:
            return read_vocabulary(path)
        except ValueError:  # e.g. rows that begin at 1
            return path.read_text(encoding="utf-8").splitlines()
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(path))
    return [model.IdToPiece(row) for row in range(model.GetPieceSize())]


def _compare(one, tokens, other, others):
    rows = enumerate(itertools.zip_longest(tokens, others))
    differ = [
        f"row {row} is {ours!r} there and {theirs!r} here"
        for row, (ours, theirs) in rows
        if ours != theirs
    ]
    if not differ:
        return
    shown = "; ".join(differ[:3])
    more = f"; {len(differ) - 3} more" * (len(differ) > 3)
    raise ValueError(
        f"{one} (the base's) and {other} (this run's) number their tokens "
        f"differently: {shown}{more}. The base's output layer would be read "
        "with its rows exchanged; nothing was loaded. Copy the base's file "
        "into this run's save folder before the run makes its own, or bring "
        "the base to this run's tokens first (align_vocabulary)"
    )
