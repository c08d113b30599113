"""Oracles of the transducer tests: every path, written out."""

import itertools

import torch


def paths(frames, labels):
    """Yield every alignment as a tuple of "b" and "y", the last one "b"."""
    steps = frames - 1 + labels
    for where in itertools.combinations(range(steps), labels):
        path = ["y" if i in where else "b" for i in range(steps)]
        yield (*path, "b")


def brute_force(log_probs, target, blank):
    """Sum all alignments of one utterance: log_probs [T, U + 1, V]."""
    frames, labels = log_probs.shape[0], len(target)
    totals = []
    for path in paths(frames, labels):
        t = u = 0
        total = log_probs.new_zeros(())
        for step in path:
            if step == "b":
                total = total + log_probs[t, u, blank]
                t += 1
            else:
                total = total + log_probs[t, u, target[u]]
                u += 1
        totals.append(total)
    return torch.logsumexp(torch.stack(totals), 0)


def hat_formula(z, blank):
    """Equations 8 and 9 of Variani 2020, in the words of the paper."""
    p_blank = 1 / (1 + torch.exp(-z[..., blank]))
    others = [i for i in range(z.shape[-1]) if i != blank]
    labels = torch.exp(z[..., others])
    labels = labels / labels.sum(-1, keepdim=True)
    probs = torch.empty_like(z)
    probs[..., blank] = p_blank
    probs[..., others] = (1 - p_blank)[..., None] * labels
    return probs
