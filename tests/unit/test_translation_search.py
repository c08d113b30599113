"""Beam search: length penalty against brute force, tokens to begin with."""

import itertools
import math

import pytest
import torch
from translation_toy import BOS, EOS, toy_batch, toy_model

from speechbrain_taskarith.translation import (
    TranslationBeamSearch,
    TranslationDecoder,
    greedy_translation,
)

VOCAB, STEPS = 4, 4


def tiny(seed):
    """Return a sharp decoder of four tokens, and a memory of two rows."""
    torch.manual_seed(seed)
    decoder = TranslationDecoder(VOCAB, 8, 2, num_layers=1).eval()
    decoder.seq_lin.weight.data *= 3
    return decoder, torch.randn(2, 5, 8), torch.tensor([1.0, 0.6])


def log_probability(decoder, tokens, memory, lens, begin=BOS):
    """Return the log probability of tokens, decoded all at once."""
    inputs = torch.tensor([[begin, *tokens[:-1]]])
    logits = decoder(inputs, memory, lens).double().log_softmax(-1)[0]
    return sum(logits[n, token].item() for n, token in enumerate(tokens))


def by_brute_force(decoder, memory, lens, alpha, begin=BOS):
    """Score every sequence that ends, and all that are cut at `STEPS`."""
    others = [token for token in range(VOCAB) if token != EOS]
    found = {}
    for size in range(STEPS + 1):
        for tokens in itertools.product(others, repeat=size):
            ends = size < STEPS
            scored = [*tokens, EOS] if ends else list(tokens)
            score = log_probability(decoder, scored, memory, lens, begin)
            found[tokens] = score / len(scored) ** alpha
    return found


def lists(found):
    return [[int(token) for token in tokens] for tokens in found]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 1.2, 2.5])
def test_length_penalty_against_brute_force(alpha):
    lengths = set()
    for seed in range(4):
        decoder, memory, lens = tiny(seed)
        search = TranslationBeamSearch(
            *(decoder, BOS, EOS),
            beam_size=3**STEPS + 1,  # as many as there are
            max_decode_ratio=0.0,
            least_steps=STEPS,
            length_penalty=alpha,
        )
        with torch.no_grad():
            found, _, scores, _ = search(memory, lens)
            for row, tokens in enumerate(lists(found)):
                one = slice(row, row + 1)
                # Alone, and without padding: nothing else may matter.
                count = round(5 * lens[row].item())
                every = by_brute_force(
                    decoder, memory[one, :count], torch.ones(1), alpha
                )
                best = max(every, key=every.get)
                assert tuple(tokens) == best
                assert scores[row].item() == pytest.approx(
                    every[best], abs=1e-5
                )
                lengths.add(len(best))
    assert len(lengths) > 1


@torch.no_grad()
def test_the_list_of_the_best_holds_each_translation_once():
    decoder, memory, lens = tiny(1)
    beams = sum(3**size for size in range(STEPS + 1)) + 5
    search = TranslationBeamSearch(
        *(decoder, BOS, EOS, beams, 0.0, STEPS),
        return_topk=True,
        topk=beams,
    )
    found, sizes, scores, _ = search(memory, lens)
    sizes = (sizes * found.shape[2]).round().long()
    for row in range(2):
        count = round(5 * lens[row].item())
        every = by_brute_force(
            decoder, memory[row : row + 1, :count], torch.ones(1), 1.0
        )
        listed = [
            tuple(one[:size].tolist())
            for one, size in zip(found[row], sizes[row])
        ]
        assert sorted(listed[:-5]) == sorted(every)
        assert scores[row, :-5].tolist() == pytest.approx(
            [every[tokens] for tokens in listed[:-5]], abs=1e-5
        )
        # Beams for which there was nothing left.
        assert listed[-5:] == [()] * 5
        assert scores[row, -5:].tolist() == [-math.inf] * 5


@torch.no_grad()
@pytest.mark.parametrize("ratios", [{}, {"min_decode_ratio": 0.5}])
def test_a_translation_does_not_depend_on_its_batch(ratios):
    limits = set()
    for seed in range(6):
        decoder, _, _ = tiny(seed)
        decoder.seq_lin.bias.data[EOS] -= 2.0
        memory, lens = torch.randn(3, 8, 8), torch.tensor([0.25, 1.0, 0.5])
        search = TranslationBeamSearch(
            *(decoder, BOS, EOS, 3, 1.5, 2),
            **{"return_topk": True, "topk": 3, **ratios},
        )
        together = search(memory, lens)
        assert search.most_steps == [3, 12, 6]
        size = together[0].shape[2]
        for row, count in enumerate((2, 8, 4)):
            alone = search(memory[row : row + 1, :count], torch.ones(1))
            tokens = alone[0][0]
            assert torch.equal(
                together[0][row, :, : tokens.shape[1]][:, :-1], tokens[:, :-1]
            )
            sizes = alone[1][0] * tokens.shape[1] / size
            torch.testing.assert_close(together[1][row], sizes)
            torch.testing.assert_close(together[2][row], alone[2][0])
            limits.add((row, int((sizes * size).round().max())))
    # At their limits, and before.
    assert {(0, 3), (2, 6), (1, 12)} <= limits


def test_the_penalty_moves_the_length():
    sizes = []
    for alpha in (0.0, 1.0, 3.0):
        total = 0
        for seed in range(6):
            decoder, memory, lens = tiny(seed)
            search = TranslationBeamSearch(
                *(decoder, BOS, EOS), 3, 0.0, 8, length_penalty=alpha
            )
            with torch.no_grad():
                total += sum(map(len, search(memory, lens)[0]))
        sizes.append(total)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_one_is_speechbrains_normalisation():
    decoder, memory, lens = tiny(7)
    with torch.no_grad():
        plain = TranslationBeamSearch(decoder, BOS, EOS, 3)(memory, lens)
        one = TranslationBeamSearch(decoder, BOS, EOS, 3, length_penalty=1.0)(
            memory, lens
        )
        off = TranslationBeamSearch(
            decoder, BOS, EOS, 3, length_normalization=False
        )(memory, lens)
        none = TranslationBeamSearch(decoder, BOS, EOS, 3, length_penalty=0)(
            memory, lens
        )
    assert plain[0] == one[0] and torch.equal(plain[2], one[2])
    assert off[0] == none[0] and torch.equal(off[2], none[2])


@pytest.mark.parametrize("alpha", [-0.1, math.inf, math.nan])
def test_penalties_that_mean_nothing(alpha):
    decoder = tiny(0)[0]
    with pytest.raises(ValueError, match="length_penalty"):
        TranslationBeamSearch(decoder, BOS, EOS, length_penalty=alpha)
    with pytest.raises(ValueError, match="give one of"):
        TranslationBeamSearch(
            decoder, BOS, EOS, length_penalty=1, length_normalization=True
        )


def test_every_utterance_may_begin_with_a_token_of_its_own():
    model = toy_model(seed=4).eval()
    model.decoder.embedding.emb.Embedding.weight.data *= 4
    inputs, _ = toy_batch(4)
    with torch.no_grad():
        speech = model.encode_speech(inputs["x"], inputs["lens"])
    memory, lens = speech.encoded, speech.lens
    begin = torch.tensor([1, 5, 6, 1])
    search = TranslationBeamSearch(
        *(model.decoder, BOS, EOS), 3, 0.0, 8, length_penalty=1.2
    )

    def greedy(memory, lens, token):
        return greedy_translation(model.decoder, memory, lens, token, EOS, 8)

    with torch.no_grad():
        together = lists(search(memory, lens, begin)[0])
        quick = greedy(memory, lens, begin)
        for row, token in enumerate(begin.tolist()):
            one = slice(row, row + 1)
            alone = search(memory[one], lens[one], token)[0]
            assert lists(alone)[0] == together[row]
            assert greedy(memory[one], lens[one], token)[0] == quick[row]
        # The token of one call is not that of the next.
        assert lists(search(memory, lens)[0]) == lists(
            search(memory, lens, BOS)[0]
        )
        assert together != lists(search(memory, lens)[0])
    assert quick != greedy(memory, lens, BOS)
    for wrong in (torch.tensor([1, 2]), torch.ones(4), torch.ones(4, 1).long()):
        with pytest.raises(ValueError, match="one for each of 4"):
            search(memory, lens, wrong)
        with pytest.raises(ValueError, match="one for each of 4"):
            greedy(memory, lens, wrong)
