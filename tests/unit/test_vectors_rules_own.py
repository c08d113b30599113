"""Rules of one's own: a subclass with one method, and what goes wrong."""

import pytest
import torch
from rules_toy import make

from speechbrain_taskarith.vectors import (
    TaskVector,
    merge_checkpoints,
    open_state,
)
from speechbrain_taskarith.vectors.rules import (
    DARE,
    TIES,
    LiNeS,
    Rule,
    from_description,
)


class Median(Rule):
    """The median of the vectors, entry by entry."""

    def merge_tensor(self, name, deltas, base=None):
        return torch.stack(deltas).median(dim=0).values


class Decay(Rule):
    """A rule with an argument, which looks at the base and writes about."""

    def __init__(self, share, scale=1.0):
        super().__init__(scale)
        self.share = share

    def merge_tensor(self, name, deltas, base=None):
        total = deltas[0].sub_(self.share * base)
        base.zero_()
        return total.double()


def test_own_rule_in_memory():
    vectors = make(3)
    before = [{n: v.clone() for n, v in w.items()} for w in vectors]
    merged = Median().combine(vectors)
    for name, value in merged.items():
        stacked = torch.stack([v[name] for v in vectors])
        assert torch.equal(value, stacked.median(dim=0).values)
    base = make(1, seed=3)[0]
    edited = Decay(0.1, scale={"norm": 0.5})(base, vectors[:1])
    expected = base["norm"] + 0.5 * (before[0]["norm"] - 0.1 * base["norm"])
    torch.testing.assert_close(edited["norm"], expected)
    assert torch.equal(edited["gain"], base["gain"])
    for vector, old in zip(vectors, before):
        assert all(torch.equal(vector[n], old[n]) for n in old)


@pytest.mark.parametrize(
    "rule",
    [
        Median(),
        Median(scale=0.3),
        Decay(0.1, 0.5),
        DARE(0.5, then=Median()),
        LiNeS(Median(0.2), slope=0.4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_own_rule_streams_the_same_bytes(rule, threads, tmp_path):
    base, vectors = make(1, seed=3)[0], make(3)
    tuned = [{n: base[n] + v for n, v in w.items()} for w in vectors]
    taus = [TaskVector.between(base, model) for model in tuned]
    expected = rule(base, taus)
    output = tmp_path / "merged.safetensors"
    merge_checkpoints(
        base, tuned, rule, output, show_progress=False, threads=threads, chunk=7
    )
    merged = open_state(output)
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name


def test_own_rule_is_described_and_never_made_by_name():
    assert Decay(0.1).describe() == {
        "rule": "Decay",
        "share": 0.1,
        "scale": 1.0,
        "module": __name__,
    }
    assert repr(Decay(0.1, 2)) == "Decay(share=0.1, scale=2)"
    # It might be called as one of this package's rules.
    twin = type("TIES", (Median,), {"__module__": __name__})()
    for rule in (Median(), twin):
        with pytest.raises(ValueError, match="make the object yourself"):
            from_description(rule.describe())

    class Forgetful(Rule):
        def __init__(self, share):
            self.kept = share

    with pytest.raises(AttributeError, match="self.share"):
        Forgetful(1).describe()


def test_own_rule_that_goes_wrong_is_named():
    class Sum(Rule):
        def merge_tensor(self, name, deltas, base=None):
            return sum(delta.sum() for delta in deltas)

    class Inverse(Rule):
        def merge_tensor(self, name, deltas, base=None):
            return 1 / (deltas[0] - deltas[0])

    vectors = [{"w": torch.ones(2, 2)}]
    with pytest.raises(ValueError, match="Sum.merge_tensor: 'w'.*shape"):
        Sum().combine(vectors)
    with pytest.raises(ValueError, match="Inverse.merge_tensor: 'w'.*NaN"):
        Inverse().combine(vectors)
    with pytest.raises(NotImplementedError, match="merge_tensor"):
        Rule().combine(vectors)


@pytest.mark.parametrize("wrong", [TIES, "TIES", lambda vectors: vectors[0]])
def test_what_is_no_rule_is_refused(wrong):
    for make_rule in (
        lambda: DARE(0.5, then=wrong),
        lambda: LiNeS(wrong, slope=0.1),
    ):
        with pytest.raises(TypeError, match=r"expected a Rule, e\.g\. TIES"):
            make_rule()
