"""Faults of SpeechBrain 1.1.2 that this plugin works around.

A test that fails here says that upstream has mended the fault: take our way
around it out, and the line in CONTRIBUTING.md.
"""

import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.lobes.models.transformer.Conformer import ConvolutionModule
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.utils.checkpoints import Checkpointer


class Killed(Exception):
    """Stands for a kill in the middle of saving."""


def killed(obj, path):
    raise Killed


def test_a_killed_save_counts_as_a_checkpoint(tmp_path):
    """The description comes first, under the final name.

    The next run prefers what is left to the whole checkpoint before it.
    A fix: write into a folder of another name and rename it last.
    """
    model = torch.nn.Linear(1, 1)
    Checkpointer(tmp_path, {"model": model}).save_checkpoint()
    saver = Checkpointer(tmp_path)
    saver.add_recoverable("model", model, custom_save_hook=killed)
    with pytest.raises(Killed):
        saver.save_checkpoint()
    again = Checkpointer(tmp_path, {"model": model})
    newest, oldest = again.find_checkpoints()
    assert list(oldest.paramfiles) == ["model"]
    assert list(newest.paramfiles) == []
    with pytest.raises(KeyError):
        again.recover_if_possible()


def test_decoding_needs_an_utterance_of_full_length():
    """The mask is as wide as the longest length, not as the encoder output.

    A fix: `length_to_mask(enc_len, max_len=encoder_out.shape[1])`.
    """
    model = TransformerASR(5, 4, 8, 2, 1, 1, 16, causal=False).eval()
    tokens = torch.ones(2, 3, dtype=torch.long)
    encoded = model.encode(torch.rand(2, 10, 4), torch.tensor([0.8, 0.6]))
    with pytest.raises(AssertionError, match="10, but got 8"):
        model.decode(tokens, encoded, torch.tensor([8, 6]))
    model.decode(tokens, encoded, torch.tensor([10, 6]))


class Noting(sb.Brain):
    """Notes the batches of an epoch."""

    def fit_batch(self, batch):
        self.batches.append(batch.tolist())
        return torch.zeros(())


def batches_of_two_epochs(set_sampler):
    sampler = DynamicBatchSampler(
        range(40),
        max_batch_length=12,
        num_buckets=4,
        shuffle=True,
        lengths_list=[float(n % 7 + 1) for n in range(40)],
    )
    brain, found = Noting(run_opts={"noprogressbar": True}), []
    if set_sampler:
        brain.train_sampler = sampler
    for epoch in (1, 2):
        brain.batches = []
        brain.fit(
            [epoch],
            torch.arange(40),
            train_loader_kwargs={"batch_sampler": sampler},
        )
        found.append(sorted(brain.batches))
    return found


def test_a_batch_sampler_is_not_told_the_epoch():
    """`Brain` calls `set_epoch` on `self.train_sampler` only.

    It does not set that for a `batch_sampler` in one process: every epoch has
    the same batches. A fix, in `_train_loader_specifics`: set it.
    """
    first, second = batches_of_two_epochs(set_sampler=False)
    assert first == second
    first, second = batches_of_two_epochs(set_sampler=True)
    assert first != second


def test_a_conformer_reads_padding():
    """The convolution's input is not masked, only its output.

    A fix: `masked_fill` of the bottleneck's output, before `conv`.
    """
    module = ConvolutionModule(8, 5).eval()
    x, mask = torch.randn(1, 10, 8), torch.zeros(1, 10, 1, dtype=torch.bool)
    mask[:, 6:] = True
    alone = module(x[:, :6])
    padded = module(x, mask)[:, :6]
    assert torch.allclose(padded[:, :4], alone[:, :4], atol=1e-6)
    assert not torch.allclose(padded[:, 4:], alone[:, 4:], atol=1e-2)
