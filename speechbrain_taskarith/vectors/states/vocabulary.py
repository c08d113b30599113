"""Vocabularies that grew: rows aligned by token before weights are subtracted.

A model fine-tuned on a new language or accent may have more output tokens
than its base, in another order. Rows of embeddings and output layers are
then no longer the same rows.
"""

import ast
import collections
import json
import re
from pathlib import Path

import torch

from speechbrain_taskarith.utils.patterns import select
from speechbrain_taskarith.vectors.states.readers import as_state


def align_vocabulary(states, vocabularies, rows):
    """Bring models to one vocabulary, the union of theirs.

    The union has the first model's tokens in their order, then each new
    token in the order of its first appearance. In the tensors named by
    `rows`, each model's rows move to their tokens' places. Rows of tokens
    that a model lacks are copied: into the base (the first model) from the
    first fine-tuned model that has the token, into a fine-tuned model from
    the aligned base. So a new token's row is not scaled by an edit, and a
    model that knows nothing of a token does not move its row.

    Arguments
    ---------
    states : sequence
        The base first, then the fine-tuned ones: paths, modules or mappings.
    vocabularies : sequence of list
        The tokens of each, row by row (see `read_vocabulary`).
    rows : str or sequence of str
        Patterns of the tensors whose first dimension is the vocabulary,
        e.g. `["*ctc_lin.w.weight", "*ctc_lin.w.bias", "*emb*.weight"]`.

    Returns
    -------
    states : list of dict
        As many as given, of the same names and shapes: ready for
        `TaskVector.between`.
    vocabulary : list
        The union, row by row.

    Raises
    ------
    ValueError
        A token twice in one vocabulary, a tensor that has not as many rows
        as its model has tokens, or a pattern that matches nothing.

    Example
    -------
    >>> base = {"out": torch.tensor([[1.0], [2.0]])}
    >>> tuned = {"out": torch.tensor([[5.0], [7.0], [4.0]])}
    >>> (base, tuned), tokens = align_vocabulary(
    ...     [base, tuned], [["a", "b"], ["b", "ß", "a"]], "out"
    ... )
    >>> tokens, base["out"].flatten(), tuned["out"].flatten()
    (['a', 'b', 'ß'], tensor([1., 2., 7.]), tensor([4., 5., 7.]))
    """
    states = [as_state(state) for state in states]
    vocabularies = [list(tokens) for tokens in vocabularies]
    if len(states) != len(vocabularies) or not states:
        raise ValueError(
            f"{len(states)} states and {len(vocabularies)} vocabularies; "
            "expected one vocabulary for each state, the base's first"
        )
    for state, tokens in zip(states, vocabularies):
        _check_unique(state, tokens)
    union = list(dict.fromkeys(t for tokens in vocabularies for t in tokens))
    places = [
        {token: row for row, token in enumerate(tokens)}
        for tokens in vocabularies
    ]
    aligned = [dict(state) for state in states]
    for state, tokens in zip(states, vocabularies):
        for name in select(state, rows):
            _check_rows(state, name, len(tokens))
    for name in select(states[0], rows):
        base = _base_rows(name, states, places, union)
        done = [base]
        for state, place in zip(states[1:], places[1:]):
            if name not in state:
                raise KeyError(f"{state.label} has no {name!r}")
            own = state[name].to(base.device)
            if own.shape[1:] != base.shape[1:]:
                raise ValueError(
                    f"{name!r}: rows of {tuple(own.shape[1:])} in "
                    f"{state.label}, of {tuple(base.shape[1:])} in the base"
                )
            moved = base.to(own.dtype).clone()
            there = [i for i, token in enumerate(union) if token in place]
            moved[there] = own[[place[union[i]] for i in there]]
            done.append(moved)
        for content, tensor in zip(aligned, done):
            content[name] = tensor
    for content, state in zip(aligned, states):
        for name, origin in state.aliases.items():
            if name != origin and torch.equal(content[name], content[origin]):
                content[name] = content[origin]
        content.update(state.extra)
    return aligned, union


def read_vocabulary(path):
    """Read the tokens of a model, row by row.

    Arguments
    ---------
    path : str or pathlib.Path
        SpeechBrain's label encoder (`'a' => 0`), a SentencePiece `.vocab`
        (token, tab, score), Hugging Face's `vocab.json` (`{token: row}`), or
        a plain text with a token a line.

    Returns
    -------
    list
        The tokens in the order of their rows: text, or what else the labels
        of an encoder are (numbers, tuples).

    Raises
    ------
    ValueError
        Rows that are missing or given twice, or a line of an encoder that
        is no token; the file is named.

    Example
    -------
    >>> path = getfixture("tmpdir") / "labels.txt"
    >>> _ = path.write("'b' => 1\\n'a' => 0\\n================\\n'x' => 'y'\\n")
    >>> read_vocabulary(path)
    ['a', 'b']
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        pairs = [(row, token) for token, row in json.loads(text).items()]
        return _in_order(pairs, path)
    # Not splitlines(): tokens may hold what that takes for an end of line.
    lines = text.replace("\r\n", "\n").split("\n")
    ends = [line.startswith("=====") for line in lines]
    # SpeechBrain's extras follow.
    end = ends.index(True) if any(ends) else len(lines)
    labels = [line for line in lines[:end] if line]
    pairs = [re.fullmatch(r"(.+) => (\d+)", line) for line in labels]
    if any(ends) or any(pairs):
        found = map(_row_and_token, pairs, labels, [path] * len(pairs))
        return _in_order(list(found), path)
    return [line.split("\t")[0] for line in labels]


def _row_and_token(match, line, path):
    """Undo the literal that SpeechBrain writes a label as."""
    try:
        return match[2], ast.literal_eval(match[1])
    except (SyntaxError, ValueError, TypeError):
        raise ValueError(
            f"{path}: cannot read the line {line!r} (expected 'token' => row, "
            "as SpeechBrain's encoders write it); save the file again with "
            "encoder.save"
        ) from None


def _in_order(pairs, path):
    """Return the tokens of `(row, token)` by row."""
    rows = {int(row): token for row, token in pairs}
    if sorted(rows) != list(range(len(pairs))):
        raise ValueError(
            f"{path}: rows are not 0 to {len(pairs) - 1}, each once; is this "
            "the vocabulary of a model's output?"
        )
    return [rows[row] for row in range(len(pairs))]


def _base_rows(name, states, places, union):
    """Return the base's rows in the union's order, missing ones copied."""
    base = states[0][name]
    rows = torch.empty(
        (len(union), *base.shape[1:]), dtype=base.dtype, device=base.device
    )
    missing = dict(enumerate(union))
    for state, place in zip(states, places):
        found = [row for row, token in missing.items() if token in place]
        source = [place[missing.pop(row)] for row in found]
        if found:
            rows[found] = state[name][source].to(rows.device, rows.dtype)
    return rows


def _check_unique(state, tokens):
    counts = collections.Counter(tokens)
    twice = [token for token in counts if counts[token] > 1][:5]
    if twice:
        raise ValueError(
            f"{state.label}: its vocabulary has {twice} more than once; rows "
            "cannot be told apart by token"
        )


def _check_rows(state, name, count):
    shape = state.info(name).shape
    if not shape or shape[0] != count:
        raise ValueError(
            f"{state.label}: {name!r} has shape {shape}, its vocabulary has "
            f"{count} tokens; the pattern matches a tensor that is not a table "
            "of tokens, or the vocabulary is another model's"
        )
