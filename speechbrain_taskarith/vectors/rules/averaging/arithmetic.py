"""Task arithmetic and the model soup: weighted sums of the vectors."""

from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.engine.workspace import weighted_sum
from speechbrain_taskarith.vectors.rules.base import Rule, each_weight


class TaskArithmetic(Rule):
    """Task arithmetic: the sum of the vectors.

    `theta = theta_base + scale * sum_i w_i tau_i` (Ilharco et al. 2023,
    arXiv 2212.04089, section 2). With one vector and a scale below 1 this
    is interpolation between base and fine-tuned model. Reference:
    `reference.task_arithmetic`.

    Arguments
    ---------
    scale : float or dict
        See `Rule`.
    weights : sequence of float or None
        One for each vector; None: all 1.

    Example
    -------
    >>> import torch
    >>> rule = TaskArithmetic(scale=0.5)
    >>> base = {"w": torch.ones(2)}
    >>> rule(base, [{"w": torch.ones(2)}, {"w": torch.tensor([0.0, 2.0])}])
    {'w': tensor([1.5000, 2.5000])}
    """

    one_each = ("weights",)
    whole_tensors = False
    carries_nan = True

    def __init__(self, scale=1.0, weights=None):
        super().__init__(scale)
        self.weights = checks.weights(weights)

    def prepare(self, stream):
        """See `Rule.prepare`: the weights."""
        return each_weight(self, stream.source.number)

    def merge(self, vectors, place, work, weights):
        """See `Rule.merge`."""
        return weighted_sum(vectors, weights, place, work)


class LinearAverage(TaskArithmetic):
    """The weighted mean of the fine-tuned models (model soup).

    `theta = sum_i w_i theta_i / sum_i w_i`, which is the base plus the
    weighted mean of the vectors (Wortsman et al. 2022, arXiv 2203.05482).
    Reference: `reference.linear_average`.

    Arguments
    ---------
    weights : sequence of float or None
        One for each vector, of any sum but zero; None: all equal.

    Example
    -------
    >>> import torch
    >>> a = {"w": torch.tensor([3.0, 0.0])}
    >>> b = {"w": torch.tensor([0.0, 3.0])}
    >>> LinearAverage(weights=[1, 3]).combine([a, b])["w"]
    tensor([0.7500, 2.2500])
    """

    def __init__(self, weights=None):
        super().__init__(weights=weights)
        if self.weights and sum(self.weights) == 0:
            what = "expected a sum other than zero"
            raise ValueError(f"weights={self.weights}: {what}")

    def prepare(self, stream):
        """See `Rule.prepare`: the weights, divided by their sum."""
        weights = super().prepare(stream)
        return [weight / sum(weights) for weight in weights]
