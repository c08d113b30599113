"""Relative lengths, absolute lengths and their mask."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechbrain_taskarith.utils.lengths import (
    absolute_lengths,
    padding_mask,
    relative_lengths,
)


@given(st.integers(1, 10**7).flatmap(lambda size: st.tuples(
    st.just(size), st.lists(st.integers(1, size), min_size=1, max_size=4)
)))  # fmt: skip
def test_there_and_back(sizes):
    size, steps = sizes
    lens = relative_lengths(torch.tensor(steps), size)
    assert lens.dtype == torch.float32
    assert absolute_lengths(lens, size).tolist() == steps


def test_rounds_as_the_numbers_are(device):
    lens = torch.tensor([0.1, 0.3, 0.7, 1.0], device=device)
    for size in (1, 7, 10**6, 7 * 10**7):
        exact = [round(Fraction(value) * size) for value in lens.tolist()]
        assert absolute_lengths(lens, size).tolist() == exact


def test_mask_by_hand(device):
    lengths = torch.tensor([0, 2, 3], device=device)
    assert padding_mask(lengths, 3).tolist() == [
        [step >= length for step in range(3)] for length in (0, 2, 3)
    ]
    assert padding_mask(lengths[:0], 3).shape == (0, 3)
    assert padding_mask(lengths, 0).shape == (3, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 2.0])
def test_what_is_no_length_can_be_told_from_one(bad):
    # Not checked here; `1 <= length <= size` is false for all of these.
    found = int(absolute_lengths(torch.tensor([bad]), 5))
    assert not 1 <= found <= 5
