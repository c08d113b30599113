"""The rows of the table: the weights of each, and how its scales are chosen.

Write d, r, s for what synthetic speech of the target, real and synthetic
speech of a source taught, each as a vector from the base. All edits are

    base + target_scale * d + scale * mean(difference)

where the difference is r - s (SYN2REAL), or r (a support language). A control
is measured beside the edit that it questions, on the same strings.
"""

import statistics
from dataclasses import dataclass

from speechbrain_taskarith.vectors import TaskVector, syn2real

# Vectors that an edit may add: what real speech of the sources has over
# synthetic speech, and all that it taught.
DIFFERENCE, SUPPORT = "real - synthetic", "real - base"
# Where the scales of a row are looked for: in all that was tried, with the
# whole of the target's own vector, or with nothing beside that.
ANYWHERE, WHOLE_TARGET, TARGET_ALONE = "anywhere", "whole", "alone"
SEARCHES = {
    "shrunk_target": (DIFFERENCE, TARGET_ALONE),
    "support_language": (SUPPORT, WHOLE_TARGET),
    "edited": (DIFFERENCE, WHOLE_TARGET),
    "members": (DIFFERENCE, WHOLE_TARGET),
    "two_scales": (DIFFERENCE, ANYWHERE),
}
# Rows that are a training of their own.
TRAINED = ("pretrained", "joint", "real_target")
# All rows, as they may stand in hparams["rows"].
ROWS = (
    *TRAINED,
    *SEARCHES,
    *("baseline", "real_source", "real_source_mean"),
    *("mean_of_both", "paper_scale", "oracle"),
)


@dataclass(frozen=True)
class Material:
    """The models that a left-out domain's rows are made of.

    Arguments
    ---------
    base : State
        What all others are tuned from.
    target : State
        The left-out domain's model of synthetic speech.
    pairs : dict
        `{source domain: (real, synthetic)}`.
    trained : dict
        What `TRAINED` names: `{row: state}`.
    """

    base: object
    target: object
    pairs: dict
    trained: dict

    def differences(self, kind=DIFFERENCE):
        """Return what each source adds: `{source domain: vector}`."""
        return {
            source: TaskVector.between(
                self.base if kind == SUPPORT else synthetic, real
            )
            for source, (real, synthetic) in self.pairs.items()
        }

    def vectors(self, kind):
        """Return the two vectors of which a search scales each."""
        return {
            "target_scale": TaskVector.between(self.base, self.target),
            "scale": TaskVector.mean(list(self.differences(kind).values())),
        }


def states_of(row, material, scales):
    """Yield the weights of a row; its figures are the mean over them.

    `scales` is the row's own: `{"target_scale": ..., "scale": ...}`, or None
    where it has none.
    """
    base, target = material.base, material.target
    pairs = list(material.pairs.values())
    real = [model for model, _ in pairs]
    if row in material.trained:
        yield material.trained[row]
    elif row == "baseline":
        yield target
    elif row == "real_source":
        yield from real
    elif row == "real_source_mean":
        yield mean_of(real, base)
    elif row == "mean_of_both":
        yield mean_of([target, mean_of(real, base)], base)
    elif row == "support_language":
        supports = [(model, base) for model in real]
        yield syn2real(target, supports, base=base, **scales)
    elif row == "members":
        for pair in pairs:
            yield syn2real(target, [pair], base=base, **scales)
    else:
        yield syn2real(target, pairs, base=base, **scales)


def axes(kind, hparams):
    """Return the scales to try, of the target's vector and of what is added."""
    # Of a support language the published form alone: all of the target.
    shares = hparams["target_scales"] if kind == DIFFERENCE else [1.0]
    return {"target_scale": shares, "scale": hparams["scales"]}


def fixed_scales(hparams):
    """Return the scales that nothing is chosen by: `{row: scales}`."""
    return {"paper_scale": {"scale": hparams["paper_scale"]}}


def mean_of(models, base):
    """Return the plain mean of some models' weights."""
    vectors = [TaskVector.between(base, model) for model in models]
    return TaskVector.mean(vectors).apply(base)


def mean_surface(surfaces):
    """Return the mean WER over several searches: `{(target, scale): WER}`."""
    return {
        point: statistics.fmean(surface[point] for surface in surfaces)
        for point in surfaces[0]
    }


def choose(where, surface):
    """Return the scales with the least WER, where they may be looked for.

    Of equals those that keep more of the target and add less.
    """
    allowed = [
        (target_scale, scale)
        for target_scale, scale in surface
        if (where != WHOLE_TARGET or target_scale == 1.0)
        and (where != TARGET_ALONE or scale == 0.0)
    ]
    best = min(allowed, key=lambda at: (surface[at], abs(1 - at[0]), at[1]))
    return dict(zip(("target_scale", "scale"), best))


def check_rows(rows):
    """Raise where a row is unknown, or what all are compared with is missing."""
    if unknown := [row for row in rows if row not in ROWS]:
        raise ValueError(
            f"rows: there are no {', '.join(unknown)}; there are "
            f"{', '.join(sorted(ROWS))}"
        )
    if missing := {"baseline", "edited"} - set(rows):
        raise ValueError(
            f"rows: {', '.join(sorted(missing))} left out; without them "
            "nothing can be compared"
        )


def line(surface):
    """Return the WER against scale with the whole of the target's vector."""
    return {s: wer for (b, s), wer in sorted(surface.items()) if b == 1.0}
