"""Adapters in the package's Emformer, which works on blocks of utterances."""

import pytest
import torch
from adapters_toy import scramble

from speechbrain_taskarith.adapters import AudioAdapterFusion, insert_adapters
from speechbrain_taskarith.adapters.combination.running import (
    Stretch,
    running_mean,
)
from speechbrain_taskarith.transducer import Emformer

NAMES = ["us", "german"]


def emformer(memory=1, layers=2):
    torch.manual_seed(0)
    return Emformer(
        input_dim=16,
        num_heads=2,
        ffn_dim=32,
        num_layers=layers,
        segment_length=4,
        right_context=2,
        left_context=4,
        memory_size=memory,
    ).eval()


def stream(encoder, x):
    context = encoder.make_streaming_context(batch=len(x))
    return torch.cat(
        [
            encoder.forward_streaming(x[:, t : t + 6], context)
            for t in range(0, x.shape[1], 4)
        ],
        1,
    )


@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("choice", ["us", "combined", ["us", None]])
def test_our_emformer_goes_through_its_adapters(memory, choice):
    encoder = emformer(memory)
    x, lens = torch.randn(2, 22, 16), torch.tensor([1.0, 0.5])
    with torch.no_grad():
        base = encoder(x, lens)
    handle = insert_adapters(encoder, NAMES, bottleneck=4, combination="fusion")
    scramble(handle)
    with torch.no_grad():
        assert torch.equal(encoder(x, lens), base)
        handle.use(choice)
        whole = encoder(x)
        torch.testing.assert_close(stream(encoder, x), whole)
        # The whole batch equals its utterances alone.
        short = encoder(x, lens)[1:, :11]
        if isinstance(choice, list):
            torch.testing.assert_close(short, base[1:, :11])
            handle.use("us")
            torch.testing.assert_close(encoder(x[:1]), whole[:1])
        else:
            torch.testing.assert_close(encoder(x[1:, :11]), short)
    assert (whole[0] - base[0]).abs().max() > 0.1
    for parameters in (
        handle.train_extraction("us"),
        handle.train_composition("MT-A"),
    ):
        encoder.train()
        handle.zero_grad()
        encoder(x, lens).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in parameters[:3])


def running_emformer(**settings):
    """Return an Emformer and its handle, scores averaged over time."""
    torch.manual_seed(0)
    encoder = emformer()
    fusion = AudioAdapterFusion(running=True, scaled=False, **settings)
    handle = insert_adapters(encoder, NAMES, bottleneck=4, combination=fusion)
    scramble(handle, scale=0.5)
    handle.use("combined")
    return encoder, handle


def naive_means(scores, size, ahead):
    """Average scores [T + R, N] of a block's frames over those so far."""
    rows = []
    for first in range(0, len(scores) - ahead, size):
        block = range(first, first + size + ahead)
        rows.append(torch.stack([scores[: t + 1].mean(0) for t in block]))
    return torch.stack(rows)


@pytest.mark.parametrize("utterances", [1, 3])
def test_running_means_over_blocks_follow_a_naive_loop(utterances):
    size, ahead, segments = 4, 2, 5
    frames = torch.randn(
        utterances, segments * size + ahead, 3, dtype=torch.float64
    )
    blocks = frames.unfold(1, size + ahead, size).movedim(-1, 2)
    expected = torch.cat([naive_means(f, size, ahead) for f in frames])
    whole = Stretch(blocks=segments, step=size)
    got = running_mean(blocks.flatten(0, 1), whole)
    torch.testing.assert_close(got, expected)
    # The same in two parts, the second behind what the first one left.
    first = Stretch(blocks=2, step=size)
    parts = [running_mean(blocks[:, :2].flatten(0, 1), first)]
    second = Stretch(first.after, blocks=3, step=size)
    parts.append(running_mean(blocks[:, 2:].flatten(0, 1), second))
    parts = [p.unflatten(0, (utterances, -1)) for p in parts]
    torch.testing.assert_close(torch.cat(parts, 1).flatten(0, 1), expected)
    torch.testing.assert_close(second.after[0], whole.after[0])
    assert second.after[1] == whole.after[1] == segments * size


def test_running_scores_go_on_from_chunk_to_chunk_of_our_emformer():
    encoder, handle = running_emformer()
    x, lens = torch.randn(2, 22, 16), torch.tensor([1.0, 0.5])
    with torch.no_grad():
        whole = encoder(x, lens)
        alone = encoder(x[1:, :11])
        size, ahead = encoder.segment_length, encoder.right_context
        contexts = [encoder.make_streaming_context(n) for n in (2, 1)]
        chunks = {0: [], 1: []}
        for t in range(0, 22, size):  # streams of their own, taking turns
            chunk = x[:, t : t + size + ahead]
            left = (lens * 22 - t).clamp(0, chunk.shape[1]) / chunk.shape[1]
            for i, row in enumerate((chunk, chunk[:1])):
                chunks[i].append(
                    encoder.forward_streaming(
                        row, contexts[i], left[: len(row)]
                    )
                )
        streamed = [torch.cat(pieces, 1) for pieces in chunks.values()]
        handle.set_combination(AudioAdapterFusion(ln_init=None))
        frame_by_frame = encoder(x, lens)
    torch.testing.assert_close(streamed[0], whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(streamed[1], whole[:1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone, whole[1:, :11], atol=1e-5, rtol=1e-4)
    assert (whole - frame_by_frame)[0].abs().max() > 1e-2


def test_running_scores_recompute_alike_in_our_emformer():
    x, found = torch.randn(2, 22, 16), []
    for recompute in (False, True):
        encoder, handle = running_emformer(recompute=recompute)
        parameters = handle.train_composition("MT-A")
        encoder(x).square().sum().backward()
        found.append([p.grad for p in parameters])
    torch.testing.assert_close(*found)


def test_running_scores_compile_alike_in_our_emformer():
    encoder, _ = running_emformer()
    compiled, x = (
        torch.compile(encoder, backend="eager"),
        torch.randn(2, 22, 16),
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), encoder(x))


def test_running_scores_over_blocks_are_refused_where_they_start_anew():
    class Silent(torch.nn.Module):
        frames_in_order = False

        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x)

    other = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Silent()])})
    fusion = AudioAdapterFusion(running=True)
    insert_adapters(other, NAMES, combination=fusion).use("combined")
    with pytest.raises(ValueError, match="works on blocks"):
        other["layers"][0](torch.randn(2, 4, 8))
