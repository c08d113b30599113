"""Local to global, the textual encoder and the noise."""

import math

import pytest
import torch

from speechbrain_taskarith.translation import (
    BlankNoise,
    LocalToGlobal,
    TextEncoder,
)

KERNELS = [5, 9, 11, 15, 17, 21]
LENS = torch.tensor([1.0, 0.5])


@pytest.mark.parametrize("layer", range(6))
def test_impulse_response_is_the_kernel(layer):
    torch.manual_seed(layer)
    local = LocalToGlobal(8, dropout=0.0).double()
    x = torch.randn(1, 60, 8).double()
    nudged = x.clone()
    nudged[0, 30] += torch.randn(8).double()
    ones = torch.ones(1)
    moved = local.layers[layer](nudged, ones) - local.layers[layer](x, ones)
    where = moved[0].abs().amax(1).nonzero().flatten().tolist()
    half = KERNELS[layer] // 2
    assert where == list(range(30 - half, 30 + half + 1))
    assert local.kernel_sizes == KERNELS


def test_gradient_of_the_depthwise_weights_is_of_valid_frames_only():
    local = LocalToGlobal(4, num_layers=2, dropout=0.0).double()
    for module in local.layers:
        x = torch.randn(2, 12, 4).double()
        junk = x.clone()
        junk[1, 6:] = math.nan
        grads = []
        for rows, lens in ((x, LENS), (junk, LENS)):
            out = module(rows, lens)
            loss = out.square().sum()
            grads.append(torch.autograd.grad(loss, module.depthwise.weight)[0])
        assert torch.equal(*grads) and grads[0].abs().min() > 0
        # Of each utterance alone, added up.
        alone = sum(
            torch.autograd.grad(
                module(x[b : b + 1, :n], torch.ones(1)).square().sum(),
                module.depthwise.weight,
            )[0]
            for b, n in enumerate((12, 6))
        )
        torch.testing.assert_close(grads[0], alone)


def test_valid_frames_pass_and_padding_does_not():
    module = LocalToGlobal(4, 1, dropout=0.0).layers[0]
    x = torch.randn(2, 8, 4)
    out = module(x, LENS)
    assert not out[1, 4:].any()
    assert (out[:, :4] - x[:, :4]).abs().amax(-1).min() > 0
    other = x.clone()
    other[1, 4:] = math.nan
    assert torch.equal(module(other, LENS), out)


def test_text_encoder_calls_every_convolution_and_knows_order():
    encoder = TextEncoder(8, 2, num_layers=3, dropout=0.0)
    x = torch.randn(2, 10, 8)
    out = encoder(x, LENS)
    out.square().sum().backward()
    for module in encoder.local.layers:
        assert module.depthwise.weight.grad.abs().max() > 0
    plain = TextEncoder(8, 2, num_layers=1, dropout=0.0, local=False)
    assert plain.local is None
    backwards = plain(x.flip(1), torch.ones(2)).flip(1)
    assert (backwards - plain(x, torch.ones(2))).abs().max() > 1e-3
    with pytest.raises(ValueError, match="raise max_length"):
        TextEncoder(8, 2, 1, max_length=9)(x, LENS)


def test_text_encoder_does_not_see_padding():
    encoder = TextEncoder(8, 2, num_layers=2, dropout=0.0).double()
    x = torch.randn(2, 10, 8).double()
    junk = x.clone()
    junk[1, 5:] = math.nan
    out = encoder(junk, LENS)
    assert torch.equal(out, encoder(x, LENS))
    alone = encoder(x[1:, :5], torch.ones(1))
    torch.testing.assert_close(out[1:, :5], alone)


@pytest.mark.parametrize("kernel, stride", [(0, 3), (5, -1)])
def test_kernels_that_cannot_be(kernel, stride):
    with pytest.raises(ValueError, match="kernel"):
        LocalToGlobal(4, 2, kernel, stride)


def test_noise_only_in_training_and_only_where_chosen():
    tokens = torch.randint(1, 9, (200, 10))
    lens = torch.ones(200)
    noise = BlankNoise(0, probability=0.3, insert_share=0.5, seed=4)
    out, out_lens = noise(tokens, lens)
    lengths = (out_lens * out.shape[1]).round().long()
    changed = [
        out[i, : lengths[i]].tolist() != tokens[i].tolist() for i in range(200)
    ]
    # A chosen sentence may draw no insertion: about one in five.
    assert 20 < sum(changed) < 80
    noise.eval()
    assert noise(tokens, lens)[0] is tokens


def test_inserted_blanks_leave_the_words():
    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (50, 10))
    lens = torch.linspace(0.1, 1, 50)
    noise = BlankNoise(0, probability=1.0, insert_share=0.2, seed=1)
    most = 0
    for _ in range(5):
        out, out_lens = noise(tokens, lens)
        for b in range(50):
            n = round(float(lens[b]) * 10)
            kept = out[b, : round(float(out_lens[b]) * out.shape[1])].tolist()
            words = [token for token in kept if token != 0]
            assert words == tokens[b, :n].tolist()
            assert len(kept) - n <= round(0.2 * n)
            assert not out[b, len(kept) :].any()
            most = max(most, len(kept) - n)
    assert most >= 1


def test_blanks_stand_in_front_of_words_and_for_punctuation():
    pieces = ["<blank>", "▁a", "b", "▁c", ".", "▁,"]
    noise = BlankNoise.for_pieces(
        pieces, 0, probability=1.0, insert_share=1.0, seed=0
    )
    tokens = torch.tensor([[1, 2, 3, 2, 4, 1, 5]]).repeat(40, 1)
    out, lens = noise(tokens, torch.ones(40))
    lengths = (lens * out.shape[1]).round().long().tolist()
    seen = set()
    for row, n in zip(out.tolist(), lengths):
        row = row[:n]
        assert [t for t in row if t] == [1, 2, 3, 2, 1]
        assert 4 not in row and 5 not in row and row[-1] == 0
        # An inserted blank never parts the pieces of a word.
        for before, after in zip(row, row[1:]):
            assert not (before == 0 and after == 2)
        seen.add(n - 7)
    assert len(seen) > 1 and max(seen) <= 7
    letters = BlankNoise.for_pieces(["<b>", "a", "b", " ", "."], 0)
    assert letters.boundaries == [3] and letters.punctuation == [4]
    starts = letters._starts(torch.tensor([[1, 2, 3, 1, 1]]))
    assert starts.tolist() == [[True, False, False, True, False]]


@pytest.mark.parametrize("words, letters", [(5, 4), (8, 4), (20, 5)])
def test_noise_has_its_strength(words, letters):
    """The mean over 10^4 sentences of characters, and where blanks stand."""
    space, count = 1, 10_000
    word = list(range(2, 2 + letters))
    row = ([*word, space] * words)[:-1]
    n = len(row)
    noise = BlankNoise(0, probability=0.1, seed=0, boundaries=[space])
    tokens = torch.tensor(row).repeat(count, 1)
    out, lens = noise(tokens, torch.ones(count))
    added = (lens * out.shape[1]).round() - n
    # The formula, integrated over a fine grid of shares.
    shares = [0.2 * (i + 0.5) / 1000 for i in range(1000)]
    drawn = torch.tensor([float(round(n * share)) for share in shares])
    error = math.sqrt(0.1 * float(drawn.square().mean()) / count)
    assert float(added.mean()) == pytest.approx(
        0.1 * float(drawn.mean()), abs=4 * error
    )
    some = float((drawn > 0).float().mean())
    assert float((added > 0).float().mean()) == pytest.approx(
        0.1 * some, abs=0.012
    )
    # In front of words and at the end, each place as often as it is long.
    places = torch.zeros(words + 1)
    for line, length in zip(out.tolist(), (n + added).long().tolist()):
        word_number, before = 0, space
        for token in line[:length]:
            if token == 0:
                assert before in (space, word[-1])
                places[word_number if before == space else words] += 1
            else:
                word_number += token == space
                before = token
    expected = torch.tensor([1.0, *[letters + 1.0] * (words - 1), letters - 1])
    expected *= places.sum() / expected.sum()
    assert ((places - expected).abs() < 4.5 * expected.sqrt() + 2).all()


def test_noise_knows_no_padding():
    noise = BlankNoise(0, probability=1.0, insert_share=1.0, pad_index=7)
    tokens = torch.full((2000, 6), 7)
    tokens[:, :3] = torch.tensor([1, 2, 3])
    out, lens = noise(tokens, torch.full((2000,), 0.5))
    lengths = (lens * out.shape[1]).round().long()
    for line, length in zip(out.tolist(), lengths.tolist()):
        assert [t for t in line[:length] if t] == [1, 2, 3]
        assert set(line[length:]) <= {7}
    assert lengths.min() == 3 and lengths.max() == 6


def test_noise_goes_on_where_a_run_was_resumed():
    tokens, lens = torch.randint(1, 9, (20, 10)), torch.ones(20)
    one = BlankNoise(0, probability=0.5, seed=3)
    drawn = [one(tokens, lens)[0] for _ in range(3)]
    other = BlankNoise(0, probability=0.5, seed=3)
    other(tokens, lens)
    resumed = BlankNoise(0, probability=0.5, seed=3)
    resumed.load_state_dict(other.state_dict())
    state = torch.get_rng_state()
    assert torch.equal(resumed(tokens, lens)[0], drawn[1])
    assert torch.equal(resumed(tokens, lens)[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("probability", "insert_share"):
        with pytest.raises(ValueError, match=name):
            BlankNoise(0, **{name: 1.5})
