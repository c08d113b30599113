"""What rules share that are put around another rule."""

from operator import attrgetter

from speechbrain_taskarith.vectors.rules.base import Rule


class Wrapper(Rule):
    """A rule that changes something about another one, its `inner`."""

    inner = None

    stages = property(attrgetter("inner.stages"))
    min_vectors = property(attrgetter("inner.min_vectors"))
    max_vectors = property(attrgetter("inner.max_vectors"))
    whole_tensors = property(attrgetter("inner.whole_tensors"))
    carries_nan = property(attrgetter("inner.carries_nan"))
    bytes_per_element = property(attrgetter("inner.bytes_per_element"))
    granularity = property(attrgetter("inner.granularity"))
    prepare = property(attrgetter("inner.prepare"))
    merge = property(attrgetter("inner.merge"))
    group = property(attrgetter("inner.group"))

    def check_number(self, number):
        """See `Rule.check_number`: also what the inner rule checks."""
        super().check_number(number)
        self.inner.check_number(number)
