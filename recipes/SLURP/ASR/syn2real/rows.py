"""The rows of the table, as sums of task vectors.

A row is a list of members, whose results are averaged; a member is a list of
terms `(scale, weights)`, with weights `{model: weight}`. It stands for
`base + sum(scale * weight * (model - base))`.
"""

from collections import Counter
from typing import NamedTuple

PAPER_SCALE = 0.25


class Model(NamedTuple):
    """A training, and the data of it."""

    name: str
    data: str


class Names:
    """The trainings' names; `mixed_first`: each target has its own."""

    def __init__(self, mixed_first):
        self.mixed_first = mixed_first

    def of(self, target):
        """Return what belongs to a target."""
        return Target(target, self.mixed_first)


class Target:
    """One left-out domain: names of its models, and sums of them.

    Arguments
    ---------
    target : str
        The domain.
    mixed_first : bool
        Everything starts from `mixed/<target>`, which was tuned on all of the
        sources' speech, and no longer from the base.
    """

    def __init__(self, target, mixed_first):
        self.target, self.mixed_first = target, mixed_first
        self.start = {f"mixed/{target}": 1.0} if mixed_first else {}
        self.joint = self._name(f"joint/{target}")

    def _name(self, name):
        return f"without_{self.target}/{name}" if self.mixed_first else name

    def __call__(self, domain, side):
        """Return the `Model` of a domain's real or synthetic speech."""
        return Model(self._name(f"{side}/{domain}"), f"{side}/{domain}")

    def model(self, side, domains):
        """Return the mean of models, as weights."""
        weight = 1.0 / len(domains)
        return {self(domain, side).name: weight for domain in domains}

    def vector(self, domain):
        """Return what synthetic speech of a domain added to the start."""
        return combine(
            [(1.0, self.model("synthetic", [domain])), (-1.0, self.start)]
        )

    def real(self, sources):
        """Return what real speech of sources added to the start, on average."""
        return combine([(1.0, self.model("real", sources)), (-1.0, self.start)])

    def difference(self, sources):
        """Return real minus synthetic speech of sources, on average."""
        return combine(
            [
                (1.0, self.model("real", sources)),
                (-1.0, self.model("synthetic", sources)),
            ]
        )

    def edited(self, start, vector, difference, b, a):
        """Return the terms of `start + b * vector + a * difference`."""
        return [(1.0, start), (b, vector), (a, difference)]


def combine(terms):
    """Return the terms as one `{model: weight}`, without zeros."""
    total = Counter()
    for scale, weights in terms:
        for model, weight in weights.items():
            total[model] += scale * weight
    return {m: round(w, 9) for m, w in sorted(total.items()) if abs(w) > 1e-9}


def rows_of(own, sources, chosen, draws, random):
    """Name the rows of one target, and those of the sweep.

    Arguments
    ---------
    own : Target
        The target.
    sources : list of str
        The source domains.
    chosen : dict
        The scales, see `Study.choose`.
    draws : int
        How many sets of each number of sources.
    random : random.Random
        Draws them.

    Returns
    -------
    dict
        `{row: members}`
    dict
        `{number of sources: members}`
    """
    start, vector = own.start, own.vector(own.target)
    difference, real = own.difference(sources), own.model("real", sources)
    baseline = own.model("synthetic", [own.target])

    def edited(b, a, of=difference):
        return own.edited(start, vector, of, b, a)

    sweep = {}
    for count in counts_of(len(sources)):
        sets = {
            tuple(sorted(random.sample(sources, count))) for _ in range(draws)
        }
        sweep[count] = [
            edited(1.0, chosen["edited"], own.difference(list(chosen_sources)))
            for chosen_sources in sorted(sets)
        ]
    rows = {
        "pretrained": [[]],
        "mixed": [[(1.0, {f"mixed/{own.target}": 1.0})]],
        "baseline": [[(1.0, baseline)]],
        # Each source by itself; their mean comes next.
        "real_source": [[(1.0, own.model("real", [s]))] for s in sources],
        "mean_of_real_sources": [[(1.0, real)]],
        "mean_of_baseline_and_real": [[(0.5, baseline), (0.5, real)]],
        "joint": [[(1.0, {own.joint: 1.0})]],
        "support": [edited(1.0, chosen["support"], own.real(sources))],
        "shrunk": [edited(chosen["shrunk"], 0.0)],
        "single": sweep[1],
        "paper_scale": [edited(1.0, PAPER_SCALE)],
        "edited": [edited(1.0, chosen["edited"])],
        "edited_both": [edited(*chosen["both"])],
        "real_target": [[(1.0, own.model("real", [own.target]))]],
    }
    if not own.mixed_first:
        name = f"mixed_then_synthetic/{own.target}"
        rows["mixed_then_synthetic"] = [[(1.0, {name: 1.0})]]
    return rows, sweep


def counts_of(sources):
    """Return the numbers of sources to sweep: 1, 2, 4, ... and all."""
    counts = [1]
    while counts[-1] * 2 < sources:
        counts.append(counts[-1] * 2)
    return sorted({*counts, sources})
