"""What a merging rule is.

A rule is a small object that holds numbers only. It says what is done to each
vector alone (`stages`) and how the vectors become one (`merge`, over a run of
elements); who feeds it, from memory or from files, is not its business.
"""

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.streaming import MemoryVectors, Stream
from speechbrain_taskarith.vectors.engine.workspace import CHUNK
from speechbrain_taskarith.vectors.rules.description import (
    describe,
    from_description,
    scale_of,
)
from speechbrain_taskarith.vectors.states.names import check_alike
from speechbrain_taskarith.vectors.states.readers import as_state

__all__ = ["Rule", "check_weights", "from_description"]


class Rule:
    """A way to make one vector out of several, and the scale to apply it.

    Subclasses keep each argument of their `__init__` as an attribute of the
    same name, so that a rule can be written down (`describe`) and made again
    (`from_description`).

    Attributes
    ----------
    stages : tuple of Stage
        What is done to each vector alone, before `merge`.
    scale : float or dict
        Factor of the merged vector, or `{pattern: factor}` of which the
        first match wins; parameters without a match stay as they are.
    fewest, most : int or None
        How many vectors the rule takes.
    """

    stages = ()
    scale = 1.0
    fewest, most = 1, None
    # Whether `merge` runs linear algebra on whole tensors, which brings its
    # own threads.
    whole_tensors = False
    # Whether NaN or infinity in any vector always shows in the result, so
    # that it is enough to look there.
    carries_nan = False

    def bytes_per_element(self, number):
        """Return how much memory a thread uses for an element of a chunk.

        Arguments
        ---------
        number : int
            How many vectors are merged.

        Returns
        -------
        int
            Bytes, over all buffers, rounded up.
        """
        return 96

    def granularity(self, shape):
        """Return how many elements `merge` must see at once.

        Arguments
        ---------
        shape : tuple of int
            A tensor's shape.

        Returns
        -------
        int
            1: any run will do.
        """
        return 1

    def prepare(self, stream):
        """Look at the vectors (after the stages) before they are merged.

        Arguments
        ---------
        stream : Stream
            The vectors.

        Returns
        -------
        object
            Passed to `merge`.
        """
        return None

    def merge(self, vectors, place, work, prepared):
        """Merge a run of elements.

        Arguments
        ---------
        vectors : iterator of arrays
            float32, each valid until the next is taken.
        place : Place
            Where the run lies.
        work : Workspace
            For buffers.
        prepared : object
            What `prepare` returned.

        Returns
        -------
        array
            float32, the merged vector before the scale.
        """
        raise NotImplementedError

    def check_number(self, number):
        """Raise unless the rule takes so many vectors.

        Arguments
        ---------
        number : int
            How many there are.
        """
        if number < self.fewest or (self.most and number > self.most):
            if self.fewest == self.most:
                wanted = f"exactly {self.fewest}"
            elif self.most:
                wanted = f"{self.fewest} to {self.most}"
            else:
                wanted = f"at least {self.fewest}"
            raise ValueError(
                f"{type(self).__name__} takes {wanted} task vectors, "
                f"got {number}"
            )

    def scales(self, names):
        """Return the scale of every parameter.

        Arguments
        ---------
        names : sequence of str
            The parameters of the merged vector.

        Returns
        -------
        dict
            `{name: float}`.

        Raises
        ------
        ValueError
            A pattern that matches nothing.
        """
        return checks.scale_by_name(self.scale, names)

    def combine(self, vectors, *, base=None):
        """Make one task vector out of several, before the scale.

        Arguments
        ---------
        vectors : sequence of TaskVector
            All over the same parameters. Mappings from name to tensor do.
        base : path, torch.nn.Module, mapping, State or None
            The base's weights, for the few rules that look at them.

        Returns
        -------
        TaskVector
            With the base they share, if they share one.

        Raises
        ------
        ValueError
            Too few or too many vectors, NaN or infinity, shapes that differ.
        KeyError
            Other parameters in one vector than in another.
        """
        import torch

        from speechbrain_taskarith.vectors.task_vector import TaskVector

        vectors = list(vectors)
        base = None if base is None else as_state(base)
        self.check_number(len(vectors))
        check_alike(vectors)
        source = MemoryVectors(vectors, base)
        # A GPU is filled by whole tensors, a cache by little; and linear
        # algebra has threads of its own.
        on_cpu = source.device is None
        chunk = CHUNK if on_cpu else 1 << 26
        alone = self.whole_tensors or not on_cpu
        threads = 1 if alone else torch.get_num_threads()
        # Not torch's default type, which a program may have changed.
        merged = {
            name: torch.empty(shape, dtype=torch.float32, device=source.device)
            for name, shape in source.shapes.items()
        }
        flat = {name: tensor.view(-1) for name, tensor in merged.items()}

        def emit(place, values, work):
            target = flat[place.name][place.start : place.stop]
            target.copy_(torch.as_tensor(values))

        stream = Stream(source, self.stages, chunk, threads)
        stream.merge(self, emit)
        deltas = {
            name: merged[source.twins.get(name, name)] for name in vectors[0]
        }
        fingerprints = {
            getattr(vector, "base_fingerprint", None) for vector in vectors
        }
        metadata = {
            "rule": self.describe(),
            "parents": [getattr(v, "metadata", {}) for v in vectors],
        }
        shared = fingerprints.pop() if len(fingerprints) == 1 else None
        return TaskVector(deltas, shared, metadata)

    def __call__(self, base, vectors, *, any_base=False):
        """Edit a model: `theta = theta_base + scale * combine(vectors)`.

        Arguments
        ---------
        base : path, torch.nn.Module, mapping or State
            The model.
        vectors : sequence of TaskVector
            What to merge; a mapping from name to tensor will do, without a
            check of its ancestry.
        any_base : bool
            True: the vectors may come from another base than this one.

        Returns
        -------
        dict
            `{name: tensor}`, complete, in the base's dtypes.

        Raises
        ------
        ValueError
            Another base than the vectors', and what `combine` raises.
        """
        base, vectors = as_state(base), list(vectors)
        merged = self.combine(vectors, base=base)
        traced = [v for v in vectors if hasattr(v, "base_fingerprint")]
        scale = scale_of(self, merged)
        return merged.apply(base, scale, any_base=any_base or not traced)

    def describe(self):
        """Write the rule down in plain types.

        Returns
        -------
        dict
            `{"rule": class name, argument: value, ...}`, for logs, model
            cards and `from_description`.

        Example
        -------
        >>> from speechbrain_taskarith.vectors import TIES
        >>> TIES(density=0.5, scale=0.6).describe()
        {'rule': 'TIES', 'density': 0.5, 'scale': 0.6, 'trim': 'global',
         'elect': 'mass'}
        """
        return describe(self, "rule")

    def __repr__(self):
        description = self.describe()
        name = description.pop("rule")
        arguments = ", ".join(f"{k}={v!r}" for k, v in description.items())
        return f"{name}({arguments})"


def check_weights(rule, given, number):
    """Return one weight for every vector.

    Arguments
    ---------
    rule : Rule
        For the error.
    given : list of float or None
        None: all 1.
    number : int
        How many vectors there are.

    Returns
    -------
    list of float
        The weights.
    """
    given = [1.0] * number if given is None else checks.weights(given)
    if len(given) != number:
        raise ValueError(
            f"{type(rule).__name__} has {len(given)} weights for {number} "
            "task vectors; expected one for each"
        )
    return given
