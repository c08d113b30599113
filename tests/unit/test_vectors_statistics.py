"""Statistics against those of all the data at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechbrain.nnet.normalization import BatchNorm1d
from speechbrain.processing.features import InputNormalization

from speechbrain_taskarith.vectors import (
    pool_normalizers,
    reestimate_statistics,
)

# -- BatchNorm -----------------------------------------------------------------


def ragged_batches(channels=3):
    """Batches of different sizes and lengths, as [B, C, T]."""
    torch.manual_seed(0)
    return [
        torch.randn(b, channels, t) * 3 + 10 * i
        for i, (b, t) in enumerate([(4, 7), (1, 2), (5, 30)])
    ]


def frames(batches):
    return torch.cat(
        [b.double().transpose(0, 1).reshape(b.shape[1], -1) for b in batches],
        dim=1,
    )


def test_statistics_are_those_of_all_frames_together():
    norm, batches = torch.nn.BatchNorm1d(3), ragged_batches()
    assert reestimate_statistics(norm, batches) == 1
    everything = frames(batches)
    torch.testing.assert_close(norm.running_mean.double(), everything.mean(1))
    torch.testing.assert_close(
        norm.running_var.double(), everything.var(1, unbiased=True)
    )
    assert norm.num_batches_tracked == 3


def test_the_order_of_batches_does_not_count():
    one, two = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    batches = ragged_batches()
    reestimate_statistics(one, batches)
    reestimate_statistics(two, batches[::-1])
    torch.testing.assert_close(one.running_var, two.running_var)
    torch.testing.assert_close(one.running_mean, two.running_mean)


def test_large_means_do_not_eat_small_variances():
    norm = torch.nn.BatchNorm1d(1)
    batches = [1e4 + torch.randn(50, 1) for _ in range(20)]
    reestimate_statistics(norm, batches)
    everything = frames(batches)
    torch.testing.assert_close(
        norm.running_var.double(), everything.var(1), rtol=1e-5, atol=0
    )


def test_only_batch_norm_buffers_change():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 3),
        torch.nn.Dropout(0.5),
        torch.nn.BatchNorm1d(3),
        torch.nn.Linear(3, 3),
        torch.nn.BatchNorm1d(3),
    )
    model[1].train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    batches = [torch.randn(16, 3) for _ in range(3)]
    assert reestimate_statistics(model, batches) == 2
    assert [m.training for m in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert changed == name.startswith(("2.running", "2.num", "4.running",
                                           "4.num")), name  # fmt: skip
    # Dropout was off: the first layer's statistics are exact.
    hidden = model[0](torch.cat(batches)).detach()
    torch.testing.assert_close(model[2].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[2].running_var, hidden.var(0))
    assert all(p.grad is None for p in model.parameters())


def test_speechbrains_batch_norm_and_a_forward_of_ones_own():
    norm = BatchNorm1d(input_size=3)
    batch = {"sig": torch.randn(4, 9, 3)}  # batch, time, channel
    count = reestimate_statistics(
        norm, [batch], forward=lambda model, batch: model(batch["sig"])
    )
    assert count == 1
    torch.testing.assert_close(
        norm.norm.running_mean, batch["sig"].mean((0, 1))
    )


def test_it_repairs_a_variance_that_an_edit_drove_negative():
    norm = torch.nn.BatchNorm1d(1)
    norm.running_var.fill_(-0.5)
    norm.eval()
    assert norm(torch.ones(2, 1)).isnan().any()
    reestimate_statistics(norm, [torch.randn(30, 1)])
    norm.eval()
    assert norm(torch.ones(2, 1)).isfinite().all()


def test_models_without_batch_norm_are_left_alone():
    def unread():
        raise AssertionError("the data must not be read")
        yield

    assert reestimate_statistics(torch.nn.LayerNorm(2), unread()) == 0


@pytest.mark.parametrize(
    "batches, match",
    [
        ([], "0 frames"),
        ([torch.ones(2, 3, 1) * float("nan"), torch.ones(2, 3, 1)], "NaN"),
        ([torch.ones(2, 4, 1)], None),
    ],
)
def test_failures_leave_the_old_statistics(batches, match):
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(7)
    norm.eval()
    with pytest.raises((ValueError, RuntimeError), match=match):
        reestimate_statistics(norm, batches)
    assert (norm.running_mean == 7).all() and not norm.training
    assert norm.num_batches_tracked == 0
    assert not norm._forward_pre_hooks


# -- input normalisers -----------------------------------------------------------


def feed(*pieces, into=None):
    """Statistics of SpeechBrain's own normaliser after these data."""
    normalizer = InputNormalization() if into is None else into
    normalizer.train()
    for piece in pieces:
        normalizer(piece, torch.ones(len(piece)))
    return normalizer._statistics_dict()


def assert_close(pooled, expected, tolerance=1e-5):
    assert pooled["count"] == int(expected["count"])
    for key in ("glob_mean", "glob_std"):
        torch.testing.assert_close(
            pooled[key], expected[key], rtol=tolerance, atol=tolerance
        )


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    shift=st.floats(-30, 30),
    seed=st.integers(0, 1000),
)
def test_pooling_equals_one_normaliser_that_saw_everything(sizes, shift, seed):
    torch.manual_seed(seed)
    pieces = [
        torch.randn(1, size + 1, 4) * (i + 1) + shift * i
        for i, size in enumerate(sizes)
    ]
    pooled = pool_normalizers([feed(piece) for piece in pieces])
    everything = torch.cat([p.double().reshape(-1, 4) for p in pieces])
    assert pooled["count"] == len(everything)
    assert_close(
        pooled,
        {
            "count": len(everything),
            "glob_mean": everything.mean(0).float(),
            "glob_std": everything.std(0, unbiased=False).float(),
        },
        tolerance=1e-4,
    )


def test_data_that_all_share_are_counted_once():
    torch.manual_seed(0)
    shared = torch.randn(2, 50, 4)
    own = [torch.randn(1, 30, 4) + 3, 2 * torch.randn(1, 70, 4) - 1]
    base = feed(shared)
    tuned = [feed(shared, piece) for piece in own]
    pooled = pool_normalizers(tuned, base=base)
    assert_close(pooled, feed(shared, *own), tolerance=1e-4)
    assert_close(pool_normalizers([], base=base), base)
    assert_close(pool_normalizers([tuned[0]], base=base), tuned[0])


def test_a_loaded_pool_normalises(tmp_path):
    pieces = [torch.randn(1, 20, 4), torch.randn(1, 30, 4) + 2]
    torch.save(pool_normalizers([feed(p) for p in pieces]), tmp_path / "n.ckpt")
    normalizer = InputNormalization()
    normalizer._load(tmp_path / "n.ckpt")
    normalizer.eval()
    everything = torch.cat(pieces, dim=1)
    out = normalizer(everything, torch.ones(1))
    torch.testing.assert_close(
        out.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0
    )
    # ... and goes on counting.
    feed(torch.randn(1, 10, 4), into=normalizer)
    assert normalizer.count == 60


def test_one_alone_and_those_that_saw_nothing():
    one = feed(torch.randn(1, 20, 4))
    empty = InputNormalization()._statistics_dict()
    assert_close(pool_normalizers([empty, one, empty]), one)


@pytest.mark.parametrize(
    "statistics, base, match",
    [
        ([], None, "at least one"),
        ([InputNormalization()._statistics_dict()], None, "any data"),
        ([{"weight": torch.ones(1)}], None, "missing"),
        (
            [feed(torch.randn(1, 9, 2)), feed(torch.randn(1, 9, 3))],
            None,
            "different sizes",
        ),
        (
            [feed(torch.randn(1, 5, 2)), feed(torch.randn(1, 5, 2))],
            feed(torch.randn(1, 90, 2)),
            "less data",
        ),
        (
            [
                {
                    "count": 3,
                    "glob_mean": torch.tensor([float("nan")]),
                    "glob_std": torch.ones(1),
                }
            ],
            None,
            "NaN",
        ),
    ],
)
def test_what_cannot_be_pooled(statistics, base, match):
    with pytest.raises(ValueError, match=match):
        pool_normalizers(statistics, base=base)
