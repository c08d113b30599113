"""Lifelong methods that store recordings: experience replay, joint training."""

import math
import random
from itertools import cycle, islice

from speechbrain_taskarith.vectors.checks import in_range
from speechbrain_taskarith.vectors.lifelong.methods import FineTuning


class Replay(FineTuning):
    """Experience replay: a small memory of earlier utterances in every batch.

    After a domain is learned, `memory` utterances are stored, equally many of
    every domain so far. They are chosen at random once, so that a smaller
    share is always a part of the larger one before.

    Arguments
    ---------
    memory : int
        Utterances stored, over all domains together.
    share : float
        Share of a batch that comes from the memory, 0 to below 1.
    seed : int
        Of the choice and of the draws.

    Example
    -------
    >>> method = Replay(memory=4, share=0.5)
    >>> method.consolidate(None, ["a", "b", "c"], None)
    >>> method.consolidate(None, ["d", "e", "f"], None)
    >>> [len(domain) for domain in method.memory_by_domain]
    [2, 2]
    >>> len(method.extra_items(8, draw=0))
    4
    """

    uses_old_data = True
    changes_training = True

    def __init__(self, memory=100, share=0.5, seed=0):
        in_range("memory", memory, 1, math.inf)
        in_range("share", share, 0, 1, open_high=True)
        self.memory, self.share, self.seed = int(memory), float(share), seed
        self.memory_by_domain = []

    def extra_items(self, count, draw):
        """As `FineTuning.extra_items`: `share` of the batch, evenly by domain."""
        domains = [domain for domain in self.memory_by_domain if domain]
        if not domains:
            return []
        # A text seed: tuples would go through hash(), which differs from
        # process to process.
        chance = random.Random(f"replay {self.seed} {draw}")
        start = chance.randrange(len(domains))
        turns = islice(cycle(domains), start, start + round(self.share * count))
        return [chance.choice(domain) for domain in turns]

    def consolidate(self, model, items, loss):
        """Take in the new domain and shrink the share of the others."""
        number, order = len(self.memory_by_domain), list(items)
        random.Random(f"memory {self.seed} {number}").shuffle(order)
        share, rest = divmod(self.memory, number + 1)
        self.memory_by_domain = [
            domain[: share + (n < rest)]
            for n, domain in enumerate([*self.memory_by_domain, order])
        ]

    def state_dict(self):
        """Return the memory: one list of utterances for each domain."""
        return {"memory": self.memory_by_domain}

    def load_state_dict(self, state):
        """As `FineTuning.load_state_dict`."""
        self.memory_by_domain = [list(domain) for domain in state["memory"]]


class JointTraining(FineTuning):
    """Train on all domains seen so far: the upper bound of a lifelong table.

    Not a lifelong method, since it stores every recording: the others are
    measured against it (intransigence). Each old domain gives at most as many
    utterances as the new one has, drawn at random; all are shuffled.

    Arguments
    ---------
    seed : int
        Of choice and order.

    Example
    -------
    >>> method = JointTraining()
    >>> method.consolidate(None, ["a", "b"], None)
    >>> sorted(method.items(["c", "d"], task=2))
    ['a', 'b', 'c', 'd']
    """

    uses_old_data = True
    changes_training = True

    def __init__(self, seed=0):
        self.seed = seed
        self.seen = []

    def items(self, new, task):
        """As `FineTuning.items`: utterances of all domains so far."""
        chance = random.Random(f"joint {self.seed} {task}")
        mixed = list(new)
        for domain in self.seen:
            mixed += chance.sample(domain, min(len(new), len(domain)))
        chance.shuffle(mixed)
        return mixed

    def consolidate(self, model, items, loss):
        """Store all utterances of the domain just learned."""
        self.seen.append(list(items))

    def state_dict(self):
        """Return all utterances so far, one list for each domain."""
        return {"seen": self.seen}

    def load_state_dict(self, state):
        """Take them back."""
        self.seen = [list(domain) for domain in state["seen"]]
