"""Searches against exhaustive enumeration of every path."""

import math
from collections import Counter

import pytest
import torch

from speechbrain_taskarith.transducer import (
    HATJoint,
    LSTMPredictor,
    RNNTJoint,
    SpeechBrainJoint,
    SpeechBrainPredictor,
    TransducerBeamSearch,
    TransducerGreedySearch,
    TransducerSampler,
)
from speechbrain_taskarith.transducer.search.prefixes import extended_keys

ALL = math.inf


def model(kind=RNNTJoint, vocab=3, seed=0, blank=0):
    torch.manual_seed(seed)
    predictor = LSTMPredictor(vocab, 4, 5, num_layers=2, blank_index=blank)
    joint = kind(6, 5, 8, vocab, blank_index=blank)
    for parameter in (*predictor.parameters(), *joint.parameters()):
        parameter.data *= 2  # far from uniform
    return predictor.eval(), joint.eval()


def exhaustive(predictor, joint, x, most, extra=None):
    """Probability of every label sequence, at most `most` labels a frame."""
    blank = joint.blank_index
    labels = [y for y in range(joint.vocab_size) if y != blank]
    found = Counter()

    def go(t, prefix, here, score):
        if t == len(x):
            found[prefix] += math.exp(score)
            return
        out, _ = predictor(torch.tensor([[blank, *prefix]]))
        log_probs = joint.log_probs(
            joint.project_encoder(x[t]), joint.project_predictor(out[0, -1])
        ).tolist()
        go(t + 1, prefix, 0, score + log_probs[blank])
        if here < most:
            more = extra(prefix, out[0, -1]) if extra else [0.0] * 9
            for y in labels:
                step = score + log_probs[y] + more[y]
                go(t, (*prefix, y), here + 1, step)

    with torch.no_grad():
        go(0, (), 0, 0.0)
    return found


def assert_same(hypotheses, oracle):
    got = {tuple(one.tokens): math.exp(one.score) for one in hypotheses}
    assert len(got) == len(hypotheses), "one prefix twice"
    assert got.keys() == oracle.keys()
    for tokens, probability in oracle.items():
        assert got[tokens] == pytest.approx(probability, rel=1e-4)
    scores = [one.score for one in hypotheses]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("kind", [RNNTJoint, HATJoint])
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("blank", [0, 2])
def test_wide_beam_is_exhaustive(kind, most, blank):
    predictor, joint = model(kind, blank=blank)
    x = 2 * torch.randn(2, 4, 6)
    x[1, 3:] = float("nan")  # padding
    search = TransducerBeamSearch(
        predictor, joint, blank, 512, 512, max_symbols=most, expand_beam=ALL
    )
    found = search.decode(x, torch.tensor([1.0, 0.75]))
    for b, frames in enumerate((4, 3)):
        oracle = exhaustive(predictor, joint, x[b, :frames], most)
        assert_same(found[b], oracle)


@pytest.mark.filterwarnings("ignore:dropout option adds")
def test_language_models_enter_as_written():
    from speechbrain.lobes.models.RNNLM import RNNLM

    predictor, joint = model(HATJoint)
    lm = RNNLM(3, 4, rnn_layers=1, rnn_neurons=5, dnn_neurons=4)
    lm.return_hidden = True
    lm.eval()
    x = torch.randn(1, 3, 6)

    def extra(prefix, out):
        scores = lm(torch.tensor([[0, *prefix]]))[0][0, -1].clone()
        scores[0] = -torch.inf
        outer = scores.log_softmax(-1)
        inner = joint.internal_lm(out)
        return (0.6 * outer - 0.2 * inner).nan_to_num(0.0).tolist()

    search = TransducerBeamSearch(
        predictor,
        joint,
        0,
        64,
        64,
        lm=lm,
        lm_weight=0.6,
        ilm_weight=0.2,
        expand_beam=ALL,
    )
    assert_same(
        search.decode(x)[0], exhaustive(predictor, joint, x[0], 1, extra)
    )
    lm.return_hidden = False
    with pytest.raises(ValueError, match="return_hidden"):
        search.decode(x)
    other = RNNLM(7, 4, rnn_layers=1, rnn_neurons=5, return_hidden=True)
    with pytest.raises(ValueError, match="one vocabulary"):
        TransducerBeamSearch(
            predictor, joint, 0, lm=other, ilm_weight=0.2
        ).decode(x)


def test_a_label_that_is_excluded_stays_so():
    predictor, joint = model(vocab=5, seed=1)
    joint.output.weight.data *= 3
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for banned in (-1e5, -math.inf):
        joint.output.bias.data[3] = banned
        search = TransducerBeamSearch(predictor, joint, 0, 4, 4, ilm_weight=0.1)
        found.append([[h.tokens for h in one] for one in search.decode(x)])
    assert found[0] == found[1] and any(h[0] for h in found[1])


def test_one_length_for_each_utterance():
    predictor, joint = model(vocab=5)
    for search in (
        TransducerBeamSearch(predictor, joint, 0),
        TransducerGreedySearch(predictor, joint, 0),
        TransducerSampler(predictor, joint, 0),
    ):
        for count in (1, 3):
            with pytest.raises(ValueError, match=f"{count} for 2 utterances"):
                search.decode(torch.rand(2, 4, 6), torch.ones(count))


def test_nan_of_a_language_model_or_of_labels_is_refused():
    from speechbrain.lobes.models.RNNLM import RNNLM

    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    predictor, joint = model(vocab=5, seed=1)
    lm = RNNLM(5, 4, rnn_layers=1, rnn_neurons=5, return_hidden=True).eval()
    for parameter in lm.parameters():
        parameter.data.fill_(math.nan)
    with_lm = TransducerBeamSearch(predictor, joint, 0, lm=lm, lm_weight=0.5)
    predictor, joint = model(HATJoint, vocab=5, seed=1)
    joint.output.bias.data[2] = math.nan
    for search in (with_lm, TransducerBeamSearch(predictor, joint, 0)):
        with pytest.raises(ValueError, match="are NaN although"):
            search.decode(x)


@pytest.mark.parametrize("beam", [1, 3, 8])
@pytest.mark.parametrize("most", [1, 3])
def test_batch_equals_singles_and_chunks_equal_whole(beam, most):
    predictor, joint = model(vocab=9, seed=1)
    # Decided enough that labels come out, and differ with the history.
    joint.output.weight.data *= 3
    joint.predictor_layer.weight.data *= 3
    search = TransducerBeamSearch(
        predictor, joint, 0, beam, beam, max_symbols=most
    )
    x, frames = 3 * torch.randn(5, 17, 6), torch.tensor([17, 1, 9, 16, 12])
    whole = search.decode(x, frames / 17)
    assert any(len(one[0].tokens) > 3 for one in whole)
    for b, count in enumerate(frames.tolist()):
        (alone,) = search.decode(x[b : b + 1, :count])
        assert [h.tokens for h in alone] == [h.tokens for h in whole[b]]
        assert [h.frames for h in alone] == [h.frames for h in whole[b]]
        for one, other in zip(alone, whole[b]):
            assert one.score == pytest.approx(other.score, abs=1e-4)
    greedy = TransducerGreedySearch(predictor, joint, 0)
    for searcher in (search, greedy):
        state = searcher.start(5)
        for t in range(0, 17, 4):
            part = x[:, t : t + 4]
            left = (frames - t).clamp(0, part.shape[1])
            state = searcher.advance(part, state, left)
        whole = searcher.decode(x, frames / 17)
        for one, other in zip(searcher.results(state), whole):
            assert [h.tokens for h in one] == [h.tokens for h in other]
            assert [h.frames for h in one] == [h.frames for h in other]


def test_greedy_is_the_likeliest_step_by_step():
    predictor, joint = model(vocab=7, seed=2)
    x = 3 * torch.randn(3, 12, 6)
    frames = [12, 5, 8]
    search = TransducerGreedySearch(predictor, joint, 0, max_symbols=2)
    found = search.decode(x, torch.tensor(frames) / 12)
    for b, count in enumerate(frames):
        tokens, when, score = [], [], 0.0
        for t in range(count):
            for here in range(3):
                out, _ = predictor(torch.tensor([[0, *tokens]]))
                scores = joint(x[b, t].view(1, 1, 1, -1), out[:, None, -1:])
                log_probs = scores.flatten().log_softmax(-1)
                y = int(log_probs.argmax()) if here < 2 else 0
                score += log_probs[y].item()
                if y == 0:
                    break
                tokens.append(y)
                when.append(t)
        (one,) = found[b]
        assert one.tokens == tokens and one.frames == when
        assert one.score == pytest.approx(score, rel=1e-5)


def test_sampler_draws_from_the_model():
    predictor, joint = model(vocab=3, seed=1)
    x = torch.randn(1, 2, 6)
    oracle = exhaustive(predictor, joint, x[0], 1)
    # At most one label a frame: after it only the blank is left.
    sampler = TransducerSampler(predictor, joint, 0, 1, max_symbols=1)
    torch.manual_seed(0)
    draws = sampler.decode(x.expand(4000, -1, -1))
    counts = Counter(tuple(one.tokens) for (one,) in draws)

    def drawn(tokens):
        """The forced blank costs nothing when drawing."""
        share = {}
        first = {}
        for prefix in [(), (1,), (2,)]:
            out, _ = predictor(torch.tensor([[0, *prefix]]))
            for t in range(2):
                scores = joint(x[:, t, None, None], out[:, None, -1:])
                share[prefix, t] = scores.flatten().softmax(-1).tolist()
        first[()] = share[(), 0][0] * share[(), 1][0]
        for y in (1, 2):
            first[(y,)] = (
                share[(), 0][0] * share[(), 1][y]
                + share[(), 0][y] * share[(y,), 1][0]
            )
            for z in (1, 2):
                first[(y, z)] = share[(), 0][y] * share[(y,), 1][z]
        return first[tokens]

    assert set(counts) <= set(oracle)
    for tokens in oracle:
        assert counts[tokens] / 4000 == pytest.approx(drawn(tokens), abs=0.04)
    several = TransducerSampler(predictor, joint, 0, 8).decode(x, torch.ones(1))
    unique = {tuple(one.tokens) for one in several[0]}
    assert len(unique) == len(several[0]) <= 8


def test_speechbrain_modules_and_recipe_style_unpacking():
    from speechbrain.nnet.embedding import Embedding
    from speechbrain.nnet.RNN import LSTM
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint

    torch.manual_seed(0)
    emb = Embedding(6, 5, consider_as_one_hot=True, blank_id=0)
    dec, proj = LSTM(7, input_size=5, num_layers=2), torch.nn.Linear(7, 8)
    predictor = SpeechBrainPredictor([emb, dec, proj], 0).eval()
    tjoint = Transducer_joint(joint="sum", nonlinearity=torch.nn.Tanh)
    joint = SpeechBrainJoint(tjoint, [torch.nn.Linear(8, 6)], 0)
    # Whole sequences and one label at a time are the same.
    tokens = torch.tensor([[0, 3, 1, 5]])
    whole, _ = predictor(tokens)
    state, parts = None, []
    for token in tokens[0]:
        out, state = predictor(token.view(1, 1), state)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)
    search = TransducerBeamSearch(predictor, joint, 0, 3, 2)
    best, scores, n_best, n_best_scores = search(torch.randn(2, 9, 8))
    assert len(best) == 2 and scores.shape == (2,)
    assert [one[0] for one in n_best] == best
    assert scores.tolist() == pytest.approx([one[0] for one in n_best_scores])
    joint.vocab_size = 6
    x = torch.randn(1, 3, 8)
    wide = TransducerBeamSearch(predictor, joint, 0, 999, 999)
    assert_same(wide.decode(x)[0], exhaustive(predictor, joint, x[0], 1))


@pytest.mark.parametrize("kind", [TransducerGreedySearch, TransducerSampler])
def test_where_all_utterances_end_before_the_padding_does(kind):
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint

    torch.manual_seed(0)
    tjoint = Transducer_joint(joint="sum", nonlinearity=torch.nn.Tanh)
    joint = SpeechBrainJoint(tjoint, [torch.nn.Linear(8, 6)], 0)
    search = kind(LSTMPredictor(6, 4, 8, num_layers=1), joint, 0)
    x = torch.randn(2, 8, 8)
    torch.manual_seed(1)
    cut = search.decode(x, torch.tensor([0.5, 0.25]))
    torch.manual_seed(1)
    assert cut == search.decode(x[:, :4], torch.tensor([1.0, 0.5]))


def test_hash_tells_prefixes_apart():
    made = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 3, (20000, 24), generator=made)
    rows = torch.unique(rows, dim=0)
    keys = torch.zeros(len(rows), dtype=torch.long)
    seen = []
    for column in rows.T:
        keys = extended_keys(keys, column)
        seen.append(keys)
    assert len(torch.unique(keys)) == len(rows)
    # Prefixes of other lengths, too.
    prefixes = {
        (*row[:count],) for row in rows[:500].tolist() for count in range(1, 25)
    }
    some = torch.unique(torch.cat([part[:500] for part in seen]))
    assert len(some) == len(prefixes)


@pytest.mark.parametrize("most", [1, 2])
def test_dropped_extensions_are_the_unlikely_ones(most):
    for seed in range(12):
        predictor, joint = model(vocab=9, seed=seed)
        joint.output.bias.data[0] += 4.0  # mostly blanks, as after training
        x = torch.randn(1, 8, 6)
        options = {"beam_size": 4, "n_best": 4, "max_symbols": most}
        every, few = (
            TransducerBeamSearch(
                predictor, joint, 0, expand_beam=expand, **options
            ).decode(x)[0]
            for expand in (ALL, 8.0)
        )
        assert few[0].tokens == every[0].tokens
        # Eight frames, each with less than 4 paths below e^-8 of the best.
        lost = every[0].score - few[0].score
        assert -1e-9 <= lost < 32 * math.exp(-8)


def test_nothing_extends_far_below_the_best(monkeypatch):
    predictor, joint = model(vocab=9)
    joint.output.bias.data[0] += 14.0
    calls, forward = [], predictor.forward
    monkeypatch.setattr(
        predictor,
        "forward",
        lambda *given: calls.append(len(given[0])) or forward(*given),
    )
    x = torch.randn(1, 8, 6) * 0.1
    for n_best in (1, 3):
        calls.clear()
        search = TransducerBeamSearch(predictor, joint, 0)
        found = search.decode(x, n_best=n_best)[0]
        assert found[0].tokens == [] and len(found) == n_best
        # A list is full; the best alone needs no label.
        assert (len(calls) == 1) == (n_best == 1)


SEARCHES = [
    TransducerBeamSearch,
    TransducerGreedySearch,
    TransducerSampler,
]


@pytest.mark.parametrize("kind", SEARCHES)
def test_nan_is_refused_in_use_and_ignored_in_padding(kind):
    predictor, joint = model()
    search, x = kind(predictor, joint, 0), torch.randn(2, 4, 6)
    x[1, 2] = float("nan")
    torch.manual_seed(0)
    found = search.decode(x, torch.tensor([1.0, 0.5]))
    torch.manual_seed(0)
    clean = search.decode(x.nan_to_num(), torch.tensor([1.0, 0.5]))
    assert found == clean
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        search.decode(x)
    joint.output.weight.data[1, 0] = float("nan")
    with pytest.raises(ValueError, match="scores of row 0 are NaN"):
        search.decode(x.nan_to_num())


@pytest.mark.parametrize("kind", SEARCHES)
def test_an_empty_batch_has_no_hypotheses(kind):
    search = kind(*model(), 0)
    assert search.decode(torch.zeros(0, 4, 6)) == []
    assert search.decode(torch.zeros(0, 4, 6), torch.zeros(0)) == []
    best, scores, n_best, n_best_scores = search(torch.zeros(0, 4, 6))
    assert best == n_best == n_best_scores == [] and len(scores) == 0


def test_bad_input():
    predictor, joint = model()
    for options in (
        {"beam_size": 0},
        {"beam_size": 2, "n_best": 3},
        {"max_symbols": 0},
        {"expand_beam": 0.0},
    ):
        with pytest.raises(ValueError, match="_beam|beam_"):
            TransducerBeamSearch(predictor, joint, 0, **options)
    x = torch.randn(2, 4, 6)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        TransducerBeamSearch(predictor, joint, 0).decode(x)
    with pytest.raises(ValueError, match="length of row 0"):
        TransducerBeamSearch(predictor, joint, 0).decode(x, torch.zeros(2))
    for kind in (TransducerBeamSearch, TransducerGreedySearch):
        with pytest.raises(ValueError, match="made with blank_index 0"):
            kind(predictor, joint, 2)
