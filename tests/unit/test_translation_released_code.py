"""Four defects of the code released with the paper, each as a check.

The defects were described, not copied: a convolution that masks out what is
valid, a text branch without it, a padding mask that is lost by the shrink,
and norms of accumulated gradients. Every check passes with our part and fails
with a defective one, written down here.
"""

import math

import pytest
import torch
from translation_toy import toy_batch, toy_model

from speechbrain_taskarith.translation import LocalToGlobal, TaskNormWeights
from speechbrain_taskarith.translation.text.local_to_global import (
    LocalExtractor,
)

LENS = torch.tensor([1.0, 0.5])


# 1. The convolution's mask.


class MasksValidFrames(LocalExtractor):
    """Takes the mask of what is valid for one of what is padding."""

    def forward(self, x, lens):
        valid = torch.arange(x.shape[1]) < (lens * x.shape[1])[:, None]
        out = torch.nn.functional.glu(self.gated(self.norm(x)))
        out = out.masked_fill(valid[..., None], 0.0)
        out = self.depthwise(out.transpose(1, 2)).transpose(1, 2)
        return x + self.after(out).masked_fill(valid[..., None], 0.0)


def check_valid_frames_learn(module):
    x = torch.randn(2, 8, 4)
    out = module(x, LENS)
    valid = torch.arange(8) < torch.tensor([8, 4])[:, None]
    added = (out - x)[valid]
    assert added.abs().amax(-1).min() > 0, "valid frames get nothing"
    weight = module.depthwise.weight
    grad = torch.autograd.grad(out[valid].square().sum(), weight)[0]
    assert grad.abs().max() > 0, "valid frames teach nothing"


def test_convolution_is_computed_on_valid_frames():
    check_valid_frames_learn(LocalToGlobal(4, 1, dropout=0.0).layers[0])
    with pytest.raises(AssertionError, match="get nothing"):
        check_valid_frames_learn(MasksValidFrames(4, 5, dropout=0.0))


# 2. The text branch.


def speech_only(model):
    """Let the text branch go past the convolutions."""
    encode = model.encode_text

    def without(tokens, lens):
        local, model.textual.local = model.textual.local, None
        try:
            return encode(tokens, lens)
        finally:
            model.textual.local = local

    model.encode_text = without
    return model


def check_both_branches_call_convolutions(model):
    inputs, _ = toy_batch()
    called = []
    for module in model.textual.local.layers:
        module.register_forward_hook(lambda *_: called.append(1))
    for task, left_out in (("st", "source"), ("mt", "x")):
        called.clear()
        model(tasks=(task,), **{**inputs, left_out: None})
        many = len(model.textual.local.layers)
        assert len(called) == many, f"{task!r} calls {len(called)} of {many}"


def test_text_goes_through_the_convolutions():
    check_both_branches_call_convolutions(toy_model())
    with pytest.raises(AssertionError, match="'mt' calls 0 of 2"):
        check_both_branches_call_convolutions(speech_only(toy_model()))


# 3. The padding mask after the shrink.


class Same(torch.nn.Module):
    """An acoustic encoder without padding of its own to mask."""

    def forward(self, x, lens):
        return x


def mask_lost(model):
    """Take every shrunk sequence for one of full length."""
    shrink = model.shrink.forward

    def without(x, logits, lens, ids=None):
        shrunk = shrink(x, logits, lens, ids)
        return shrunk._replace(lens=torch.ones_like(shrunk.lens))

    model.shrink.forward = without
    return model


def check_padding_of_segments_is_masked(model):
    model.eval()
    torch.manual_seed(0)
    model.acoustic = Same()
    frames = torch.randn(2, 30, 16)
    lens = torch.tensor([1.0, 0.3])
    tokens = torch.randint(3, 8, (2, 4))
    speech = model.encode_speech(frames, lens)
    lengths = speech.segments.lengths.tolist()
    assert lengths[1] < lengths[0], "the batch is ragged after the shrink"
    both = model.decoder(tokens, speech.encoded, speech.lens)
    alone = model.encode_speech(frames[1:, :9], torch.ones(1))
    one = model.decoder(tokens[1:], alone.encoded, alone.lens)
    assert torch.allclose(both[1:], one, atol=1e-4), "padding is attended to"


def test_padding_mask_outlives_the_shrink():
    check_padding_of_segments_is_masked(toy_model())
    with pytest.raises(AssertionError, match="padding is attended to"):
        check_padding_of_segments_is_masked(mask_lost(toy_model()))


# 4. The norms.


class AccumulatedNorms(TaskNormWeights):
    """Takes the norm of `.grad` after each task's backward, one on another."""

    def observe(self, losses, modules, share=1.0):
        self.found = {}
        for task, loss in losses.items():
            loss.backward(retain_graph=True)
            for part, module in modules.items():
                grads = [p.grad for p in module.parameters()]
                squares = sum(g.square().sum() for g in grads if g is not None)
                self.found[task, part] = float(squares) ** 0.5

    def step(self):
        for task in self.tasks:
            ratio = max(
                min(1.0, self.found[task, p] / self.found[self.main, p])
                for p in self.parts[task]
            )
            self._weights[task] *= ratio ** (1 / len(self.parts[task]))


def check_norms_do_not_hang_on_the_order(kind):
    results = []
    for order in (("st", "asr"), ("asr", "st")):
        layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        x = torch.tensor([3.0, 4.0])
        losses = {"st": layer(x).sum(), "asr": 0.5 * layer(x.flip(0)).sum()}
        weights = kind(("asr",), interval=1, floor=0.0)
        weights.observe({t: losses[t] for t in order}, {"acoustic": layer})
        weights.step()
        results.append(weights["asr"])
    assert results[0] == results[1], f"the order decides: {results}"
    assert math.isclose(results[0], 0.5), f"not its own norm: {results}"


def test_norms_are_those_of_each_task_alone():
    check_norms_do_not_hang_on_the_order(TaskNormWeights)
    with pytest.raises(AssertionError, match="the order decides"):
        check_norms_do_not_hang_on_the_order(AccumulatedNorms)
