"""Which utterance a row of a batch belongs to, also while it is decoded."""

import sys

import torch

# Modules whose searches have several rows for an utterance, side by side.
_SEARCHES = ("transformers.", "speechbrain.decoders.")


def utterances_of(rows, number, *, in_blocks=False):
    """Say which utterances the rows of a batch are.

    `number` utterances were named. A layer works `in_blocks` if an utterance
    comes as several rows. Returns `(kept, times)`: the utterances that are in
    the batch, None for all of them in order, and how many rows each has.
    `ValueError` where that cannot be told.
    """
    whisper, searching = None, False
    # A graph has no callers; what it was compiled for has one row for each.
    if not torch.compiler.is_compiling():
        whisper, searching = _search()
    kept = None if whisper is None else _of_whisper(whisper, number)
    present = number if kept is None else len(kept)
    times = rows // max(present, 1)
    alone = times == 1 or in_blocks or searching
    if rows != times * present or not (alone or not rows):
        what = "in the batch" if kept is None else "left in the batch"
        raise ValueError(
            f"{number} utterance(s) were named by use(...), {present} of them "
            f"{what}, which has {rows} rows; call use(...) for every batch, "
            "with one name an utterance"
        )
    return kept, times


def _search():
    """Return the variables of Whisper's decoding, and if a search calls us."""
    frame, searching = sys._getframe(1), False
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_SEARCHES):
            name = frame.f_code.co_name
            if name == "generate_with_fallback":
                return frame.f_locals, True
            searching = searching or name in ("generate", "forward_step")
        frame = frame.f_back
    return None, searching


def _of_whisper(found, number):
    """Return which recordings the rows of a call of Whisper's `generate` are.

    Recordings that are finished leave its batch, and those whose text does
    not look right are decoded again, at another temperature.
    """
    try:
        size, expanded = found["batch_size"], len(found["seek"])
        rows = [found["batch_idx_map"][i] for i in found["fallback_index_map"]]
        static = found["generation_config"].cache_implementation == "static"
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            "this version of transformers does not show which recordings "
            f"Whisper is decoding ({error!r}); decode them one at a time"
        ) from None
    if size != number:
        raise ValueError(
            f"{number} utterance(s) were named by use(...), but generate got "
            f"{size} recording(s); name one adapter for each"
        )
    kept = [row // (expanded // size) for row in rows]
    if static and len(kept) < size:  # filled up by rows that do not count
        kept += [kept[-1]] * (size - len(kept))
    return kept
