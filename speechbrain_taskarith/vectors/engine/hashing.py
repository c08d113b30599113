"""Fingerprints of several checkpoints at once."""

from typing import NamedTuple

from speechbrain_taskarith.vectors.engine.streaming import Pass
from speechbrain_taskarith.vectors.states import fingerprint as fingerprints


class _Hashed(NamedTuple):
    state: object
    name: str
    size: int


class Hasher:
    """Fingerprints of several states by several threads.

    Arguments
    ---------
    threads : int
        Number of threads.
    progress : bool
        Show a progress bar.
    """

    def __init__(self, threads, progress):
        self.passes, self.bytes_read = Pass(threads, progress=progress), 0

    def hash(self, states):
        """Return the fingerprints, and let the states remember theirs.

        Arguments
        ---------
        states : sequence of State
            What to hash; what is hashed already is not again.

        Returns
        -------
        list of str
            One fingerprint for each state.
        """
        items = [
            _Hashed(state, name, state.info(name).nbytes)
            for state in states
            if "fingerprint" not in vars(state)
            for name in state
        ]
        # The largest first, so that no thread is left alone with it.
        items.sort(key=lambda item: -item.size)
        digests = self.passes.run(
            lambda item, work: item.state.digest(item.name),
            items,
            "fingerprints",
        )
        self.bytes_read += sum(item.size for item in items)
        found = {}
        for item, digest in zip(items, digests):
            found.setdefault(id(item.state), {})[item.name] = digest
        for state in states:
            if id(state) in found:
                leaves = found[id(state)]
                vars(state)["fingerprint"] = fingerprints.combine(leaves)
        return [state.fingerprint for state in states]
