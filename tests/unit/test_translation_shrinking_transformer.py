"""Shrinking in SpeechBrain's Transformers: forward, gradients, search, files."""

import copy
import itertools
import logging

import pytest
import torch
from speechbrain.decoders.scorer import CTCScorer, ScorerBuilder
from speechbrain.decoders.seq2seq import (
    S2STransformerBeamSearcher,
    S2STransformerGreedySearcher,
)
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.lobes.models.transformer.TransformerST import TransformerST
from speechbrain.nnet.linear import Linear
from speechbrain.utils.checkpoints import average_checkpoints
from speechbrain.utils.parameter_transfer import Pretrainer
from translation_toy import toy_model

from speechbrain_taskarith.translation import (
    BlankNoise,
    CTCShrink,
    LookingBack,
    ShrinkingTransformer,
    TextEncoder,
)

WIDTH, FEATURES, VOCAB = 32, 20, 11
BOS, EOS, BLANK = 1, 2, 3
PAD = 0
KINDS = {
    "transformer": {"attention_type": "regularMHA"},
    "conformer": {
        "encoder_module": "conformer",
        "attention_type": "RelPosMHAXL",
        "kernel_size": 3,
    },
    "rope": {"encoder_module": "conformer", "attention_type": "RoPEMHA"},
    "branchformer": {
        "encoder_module": "branchformer",
        "attention_type": "RelPosMHAXL",
        "kernel_size": 7,
        "csgu_linear_units": 24,
    },
}


def stock(kind="transformer", cls=TransformerASR, **settings):
    """Return a small model of SpeechBrain's without dropout."""
    settings = {"normalize_before": True, **KINDS[kind], **settings}
    torch.manual_seed(0)
    return cls(
        VOCAB,
        FEATURES,
        WIDTH,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=settings.pop("num_decoder_layers", 1),
        d_ffn=WIDTH,
        dropout=0.0,
        causal=False,
        **settings,
    )


class Recipe(torch.nn.Module):
    """The modules of a recipe, as its list `model` has them."""

    def __init__(self, transformer, pooling="first", textual=False, **settings):
        super().__init__()
        torch.manual_seed(settings.pop("seed", 0))
        if not isinstance(transformer, torch.nn.Module):
            transformer = stock(**transformer)
        self.ctc_lin = Linear(input_size=WIDTH, n_neurons=VOCAB)
        self.seq_lin = Linear(input_size=WIDTH, n_neurons=VOCAB)
        # An untrained head sees one label alone.
        torch.nn.init.normal_(self.ctc_lin.w.weight)
        self.shrinking = ShrinkingTransformer(
            transformer,
            self.ctc_lin,
            CTCShrink(BLANK, pooling, train_weights=pooling == "weighted"),
            LookingBack(WIDTH, 2, dropout=0.0),
            textual=TextEncoder(WIDTH, 2, 1, dropout=0.0) if textual else None,
            **settings,
        )

    def losses(self, src, tgt, lens):
        """Return CTC's and the decoder's loss, as a recipe's train.py does."""
        frames, out = self.shrinking(src, tgt, lens, pad_idx=PAD)
        scores = self.ctc_lin(frames).log_softmax(-1)
        ctc = torch.nn.functional.ctc_loss(
            scores.float().transpose(0, 1),
            tgt[:, 1:],
            (lens * frames.shape[1]).round().long(),
            (tgt[:, 1:] != PAD).sum(1),
            BLANK,
        )
        out = self.seq_lin(out)[:, :-1].flatten(0, 1)
        return ctc, torch.nn.functional.cross_entropy(
            out, tgt[:, 1:].flatten(), ignore_index=PAD
        )


def batch(lengths=(24, 9, 16), tokens=(5, 2, 4), seed=0):
    """Return features, tokens behind their beginning, relative lengths."""
    generator = torch.Generator().manual_seed(seed)
    # Speech that hardly changes from frame to frame.
    shape = len(lengths), max(lengths) // 4 + 1, FEATURES
    src = torch.randn(shape, generator=generator).repeat_interleave(4, 1)
    src = src[:, : max(lengths)]
    tokens = tokens[: len(lengths)]
    tgt = torch.full((len(lengths), max(tokens) + 1), PAD)
    for row, count in enumerate(tokens):
        drawn = torch.randint(4, VOCAB, (count,), generator=generator)
        tgt[row, : count + 1] = torch.cat([torch.tensor([BOS]), drawn])
    return src, tgt, torch.tensor(lengths) / max(lengths)


def alone(recipe, plain, frames, tgt):
    """Return what the decoder gives for one utterance without padding.

    Frames [T, d] by a loop over runs of labels; SpeechBrain's own decoder, of
    a model that was never wrapped.
    """
    labels = recipe.ctc_lin(frames).argmax(-1).tolist()
    first, segments = 0, []
    for _, run in itertools.groupby(labels):
        segments.append(frames[first])
        first += len(list(run))
    shrunk = torch.stack(segments)[None]
    x = recipe.shrinking.looking_back(shrunk, frames[None], torch.ones(1))
    if recipe.shrinking.textual is not None:
        x = recipe.shrinking.textual(x, torch.ones(1))
    return plain.decode(tgt[None], x)[0][0], len(segments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("textual", [False, True])
def test_forward_and_decode_equal_utterances_alone(kind, textual):
    transformer = stock(kind)
    plain = copy.deepcopy(transformer).eval()
    recipe = Recipe(transformer, textual=textual).eval()
    src, tgt, lens = batch()
    with torch.no_grad():
        frames, out = recipe.shrinking(src, tgt, lens, pad_idx=PAD)
        assert torch.equal(frames, recipe.shrinking.encode(src, lens))
        full = torch.ones_like(lens)
        assert torch.equal(
            recipe.shrinking.encode(src, full), plain.encode(src, full)
        )
        lengths = (lens * frames.shape[1]).round().int()
        # What lies in the padding is of no matter to the decoder.
        outside = torch.arange(frames.shape[1]) >= lengths[:, None]
        dirty = frames.masked_fill(outside[..., None], float("nan"))
        found, attention = recipe.shrinking.decode(tgt, dirty, lengths)
        counts = []
        for row, length in enumerate(lengths.tolist()):
            single = plain.encode(src[row : row + 1, :length])
            torch.testing.assert_close(frames[row, :length], single[0])
            size = int((tgt[row] != PAD).sum())
            expected, count = alone(
                recipe, plain, frames[row, :length], tgt[row, :size]
            )
            counts.append(count)
            torch.testing.assert_close(out[row, :size], expected)
            torch.testing.assert_close(found[row, :size], expected)
            # On frames: a segment's weight lies at its first one.
            assert not attention[row, :, length:].any()
            assert int((attention[row, 0] > 0).sum()) <= count
    torch.testing.assert_close(
        attention.sum(-1), torch.ones_like(attention[..., 0])
    )
    assert len(counts) < sum(counts) < 0.9 * int(lengths.sum())


def test_the_padding_token_is_not_the_blank():
    recipe = Recipe({}).eval()
    src, tgt, lens = batch()
    # A token that is the blank is a token like any other.
    tgt[:, 1] = BLANK
    with torch.no_grad():
        out = recipe.shrinking(src, tgt, lens, pad_idx=PAD)[1]
        masked = recipe.shrinking(src, tgt, lens, pad_idx=BLANK)[1]
    row = slice(0, 1)
    assert not torch.allclose(out[row], masked[row])
    torch.testing.assert_close(
        out[row],
        recipe.shrinking(src[row], tgt[row], lens[row], pad_idx=EOS)[1],
        msg="without padding, no padding token matters",
    )


def gradients(recipe, loss):
    """Return the greatest gradient of each part of a recipe, by name."""
    recipe.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in recipe.named_parameters():
        part = name.partition("transformer.")[2] or name
        part = part.removeprefix("shrinking.").partition(".")[0]
        size = 0.0 if parameter.grad is None else float(parameter.grad.norm())
        found.setdefault(part, []).append(size)
    return found


@pytest.mark.parametrize("pooling", ["first", "weighted"])
def test_every_part_is_trained_by_the_decoders_loss(pooling):
    recipe = Recipe({"kind": "conformer"}, pooling, textual=True).train()
    found = gradients(recipe, recipe.losses(*batch())[1])
    head = found.pop("ctc_lin")
    assert all(head) if pooling == "weighted" else not any(head)
    assert {"encoder", "decoder", "looking_back", "textual"} < set(found)
    # A key's bias shifts all scores of a query alike: no softmax sees it.
    for part, sizes in found.items():
        assert sum(size < 1e-6 for size in sizes) <= (part != "encoder"), part


def test_gradients_do_not_see_the_padding():
    recipe = Recipe({}, "weighted", textual=True).train()
    src, tgt, lens = batch()
    outside = torch.arange(24) >= (lens * 24).round()[:, None]

    def fill(value):
        """Return gradients where the encoder leaves a value in its padding."""
        hook = recipe.shrinking.transformer.encoder.register_forward_hook(
            lambda module, args, out: (
                out[0].masked_fill(outside[..., None], value),
                *out[1:],
            )
        )
        recipe.zero_grad()
        recipe.shrinking(src, tgt, lens, pad_idx=PAD)[
            1
        ].square().sum().backward()
        hook.remove()
        return {
            name: parameter.grad.clone()
            for name, parameter in recipe.named_parameters()
            if parameter.grad is not None
        }

    clean, dirty = fill(0.0), fill(float("nan"))
    assert "ctc_lin.w.weight" in clean
    for name, gradient in clean.items():
        assert torch.equal(gradient, dirty[name]), name


def test_speechbrains_decode_has_no_gradient():
    """Why a recipe cannot train through `Transformer.decode`."""
    plain = stock()
    frames = torch.randn(1, 5, WIDTH, requires_grad=True)
    out, _ = plain.decode(torch.ones(1, 3).long(), frames)
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_the_same_parts(dtype):
    recipe = Recipe({"kind": "conformer"}, textual=True).train()
    exact = recipe.losses(*batch())
    with torch.autocast("cpu", dtype):
        losses = recipe.losses(*batch())
    for half, whole in zip(losses, exact):
        torch.testing.assert_close(
            half.float(), whole, atol=0.0, rtol=0.1, check_dtype=False
        )
    found = gradients(recipe, sum(losses).float())
    # The head, too: what autocast casts without gradient it does not keep.
    for part, sizes in found.items():
        assert sum(size == 0 for size in sizes) <= 1, part
    with torch.autocast("cpu", dtype), torch.no_grad():
        frames = recipe.eval().shrinking.encode(*batch()[::2])
        hyps = searcher(recipe)(frames, batch()[2])[0]
    assert len(hyps) == 3


def searcher(recipe, ctc=0.0, model=None, **settings):
    """Return a beam search as a recipe's YAML builds it."""
    scorer = None
    if ctc:
        head = CTCScorer(recipe.ctc_lin, BLANK, EOS)
        scorer = ScorerBuilder(weights={"ctc": ctc}, full_scorers=[head])
    settings = {
        "min_decode_ratio": 0.0,
        "max_decode_ratio": 0.5,
        "beam_size": 3,
        "using_eos_threshold": False,
        **settings,
    }
    return S2STransformerBeamSearcher(
        [model or recipe.shrinking, recipe.seq_lin],
        bos_index=BOS,
        eos_index=EOS,
        scorer=scorer,
        **settings,
    )


def test_batched_search_equals_single_ones():
    """Without CTC's scorer: SpeechBrain's depends on the rest of the batch."""
    recipe = Recipe({"kind": "conformer"}, textual=True).eval()
    src, _, lens = batch((24, 9, 16))
    with torch.no_grad():
        frames = recipe.shrinking.encode(src, lens)
    outside = torch.arange(24) >= (lens * 24).round()[:, None]
    frames = frames.masked_fill(outside[..., None], 0.0)
    # As many steps for each: SpeechBrain counts the padding, too.
    together = searcher(recipe)(frames, lens)
    for row, length in enumerate((24, 9, 16)):
        single = searcher(recipe, max_decode_ratio=12.01 / length)(
            frames[row : row + 1, :length], torch.ones(1)
        )
        assert together[0][row] == single[0][0]
        torch.testing.assert_close(together[2][row], single[2][0])
    greedy = S2STransformerGreedySearcher(
        [recipe.shrinking, recipe.seq_lin],
        bos_index=BOS,
        eos_index=EOS,
        min_decode_ratio=0.0,
        max_decode_ratio=0.5,
    )
    assert len(greedy(frames, lens)[0]) == 3


def test_ctc_is_scored_on_frames():
    transformer = stock()
    plain = copy.deepcopy(transformer).eval()
    recipe = Recipe(transformer).eval()
    src, _, lens = batch()
    with torch.no_grad():
        frames = recipe.shrinking.encode(src, lens)
    # Nothing but CTC: the decoder, and so shrinking, has no say.
    found = searcher(recipe, ctc=1.0)(frames, lens)
    expected = searcher(recipe, ctc=1.0, model=plain)(frames, lens)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[2], expected[2])


def test_steps_of_the_search_are_counted_in_frames():
    recipe = Recipe({}).eval()
    # A head that always says the same: one segment, but 24 frames.
    torch.nn.init.zeros_(recipe.ctc_lin.w.weight)
    torch.nn.init.constant_(recipe.seq_lin.w.bias, 0.0)
    recipe.seq_lin.w.bias.data[EOS] = -1e4
    src, _, lens = batch((24,))
    with torch.no_grad():
        frames = recipe.shrinking.encode(src, lens)
        hyps = searcher(recipe, max_decode_ratio=0.5)(frames, lens)[0]
    assert len(hyps[0]) in (11, 12)


def test_equal_frames_of_other_lengths_are_apart():
    recipe = Recipe({}).eval()
    _, tgt, _ = batch((16, 16))
    frames = torch.randn(1, 16, WIDTH).expand(2, -1, -1)
    tgt, lengths = tgt[:1].expand(2, -1), torch.tensor([5, 16])
    together = recipe.shrinking.decode(tgt, frames, lengths)[0]
    for row in range(2):
        single = recipe.shrinking.decode(
            tgt[:1], frames[:1, : lengths[row]], lengths[row : row + 1]
        )[0]
        torch.testing.assert_close(together[row : row + 1], single)


def count_shrinks(recipe):
    """Return a list that gets the batch size of every shrink."""
    seen = []
    recipe.shrinking.shrink.register_forward_hook(
        lambda module, args, out: seen.append(len(args[0]))
    )
    return seen


def test_an_utterance_is_shrunk_once_a_search():
    recipe = Recipe({}).eval()
    src, _, lens = batch()
    with torch.no_grad():
        frames = recipe.shrinking.encode(src, lens)
    seen = count_shrinks(recipe)
    searcher(recipe)(frames, lens)
    assert seen == [3]
    searcher(recipe)(frames, lens)
    assert seen == [3, 3]


def test_what_was_shrunk_before_is_never_taken_for_another():
    recipe = Recipe({}, "weighted").eval()
    src, tgt, _ = batch((16, 16))
    lengths = torch.tensor([16, 10])

    def decode(frames, lengths):
        found, _ = recipe.shrinking.decode(tgt, frames, lengths)
        # The same, by a model that remembers nothing.
        other = copy.deepcopy(recipe).shrinking
        assert other._found is None
        torch.testing.assert_close(found, other.decode(tgt, frames, lengths)[0])
        return found

    with torch.no_grad():
        frames = recipe.shrinking.encode(src)
        first = decode(frames, lengths)
        # Shorter, in the same tensors.
        lengths[0] = 5
        second = decode(frames, lengths)
        # Another batch in the same memory, with and without a new tensor.
        frames.copy_(frames.flip(1))
        third = decode(frames, lengths)
        again = torch.empty(0).set_(frames)
        again.mul_(2.0)
        fourth = decode(again, lengths)
        # Other weights, by an optimizer, a checkpoint, and a swap.
        recipe.shrinking.looking_back.query.weight.mul_(2.0)
        fifth = decode(again, lengths)
        recipe.ctc_lin.load_state_dict(
            {n: t.sin() for n, t in recipe.ctc_lin.state_dict().items()}
        )
        sixth = decode(again, lengths)
        weight = recipe.shrinking.looking_back.value.weight
        weight.data = weight.data.flip(0)
        seventh = decode(again, lengths)
        # A view in the same memory.
        decode(frames, None)
        decode(frames[:, :7], None)
    results = [first, second, third, fourth, fifth, sixth, seventh]
    for i, (one, other) in enumerate(itertools.pairwise(results)):
        assert not torch.allclose(one, other), i
    with torch.inference_mode():
        # These have no versions, so nothing is remembered of them.
        buffer = torch.randn(2, 16, WIDTH)
        one = recipe.shrinking.decode(tgt, buffer, lengths)[0]
        buffer.normal_()
        assert not torch.allclose(
            one, recipe.shrinking.decode(tgt, buffer, lengths)[0]
        )


def test_training_forgets_the_last_search():
    recipe = Recipe({})
    src, tgt, lens = batch()
    with torch.no_grad():
        searcher(recipe)(recipe.shrinking.encode(src, lens), lens)
        assert recipe.shrinking._found is not None
        recipe.losses(src, tgt, lens)
    assert recipe.shrinking._found is None


def test_a_checkpoint_of_the_stock_model_loads(tmp_path):
    transformer = stock("conformer")
    recipe = Recipe(transformer)
    other = stock("conformer")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    # As the recipes' list `model`.
    old = torch.nn.ModuleList([torch.nn.Linear(1, 1), other, recipe.seq_lin])
    torch.save(old.state_dict(), tmp_path / "model.ckpt")
    new = torch.nn.ModuleList(
        [torch.nn.Linear(1, 1), recipe.shrinking, recipe.seq_lin]
    )
    with pytest.raises(RuntimeError, match="looking_back.query") as error:
        new.load_state_dict(old.state_dict())
    assert "Unexpected" not in str(error.value)
    pretrainer = Pretrainer(
        tmp_path / "collected",
        loadables={"model": new},
        paths={"model": str(tmp_path / "model.ckpt")},
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    # One of its own, and a key too many.
    states = new.state_dict()
    new.load_state_dict(states)
    with pytest.raises(RuntimeError, match="Unexpected.*transformer.wrong"):
        new.load_state_dict({**states, "1.wrong": torch.ones(1)})


def test_checkpoints_are_averaged_and_loaded(tmp_path):
    from speechbrain.utils.checkpoints import Checkpointer

    recipe = Recipe({}, textual=True)
    # One tensor, one name: the head is the recipe's.
    states = recipe.state_dict()
    assert len({t.data_ptr() for t in states.values()}) == len(states)
    checkpointer = Checkpointer(tmp_path, {"model": recipe})
    for _ in range(2):
        with torch.no_grad():
            for parameter in recipe.parameters():
                parameter.add_(1.0)
        checkpointer.save_checkpoint()
    last = {n: t.clone() for n, t in recipe.state_dict().items()}
    found = average_checkpoints(checkpointer.find_checkpoints(), "model")
    recipe.load_state_dict(found, strict=True)
    for name, parameter in recipe.named_parameters():
        torch.testing.assert_close(parameter.data, last[name] - 0.5)


@pytest.fixture
def st_recipe():
    """A recipe of speech translation with all auxiliary tasks."""
    torch.manual_seed(0)
    transformer = stock(
        cls=TransformerST,
        ctc_weight=0.3,
        asr_weight=0.3,
        mt_weight=0.2,
        asr_tgt_vocab=VOCAB,
        mt_src_vocab=VOCAB,
    )
    return Recipe(transformer, textual=True)


def test_auxiliary_tasks_are_the_wrapped_models(st_recipe):
    recipe = st_recipe.eval()
    src, tgt, lens = batch()
    with torch.no_grad():
        plain = copy.deepcopy(recipe.shrinking.transformer)
        plain.decoder._forward_pre_hooks.clear()
        frames, _ = recipe.shrinking(src, tgt, lens, pad_idx=PAD)
        # The ASR decoder attends to frames.
        assert torch.equal(
            recipe.shrinking.forward_asr(frames, src, tgt, lens, PAD),
            plain.forward_asr(frames, src, tgt, lens, PAD),
        )
        recipe.shrinking.textual = None
        for one, other in zip(
            recipe.shrinking.forward_mt(tgt, tgt, PAD),
            plain.forward_mt(tgt, tgt, PAD),
        ):
            assert torch.equal(one, other)


def test_text_goes_through_the_textual_encoder(st_recipe):
    recipe = st_recipe.train()
    _, tgt, _ = batch()
    out = recipe.shrinking.forward_mt(tgt, tgt, pad_idx=PAD)[1]
    found = gradients(recipe, out.square().mean())
    assert sum(map(bool, found["textual"])) >= len(found["textual"]) - 1
    assert not any(found["looking_back"]) and not any(found["ctc_lin"])
    # Padding of the transcript does not matter.
    padded = torch.nn.functional.pad(tgt, (0, 3), value=PAD)
    recipe.shrinking.transformer.eval()
    recipe.shrinking.transformer.train(True)
    torch.testing.assert_close(
        recipe.shrinking.forward_mt(padded, tgt, pad_idx=PAD)[1], out
    )


def test_blank_noise_on_transcripts(st_recipe):
    _, tgt, _ = batch()
    # SentencePiece's unknown word is often the padding token as well.
    tgt[0, 2] = PAD
    shrinking = st_recipe.shrinking.train()
    seen = []
    shrinking.transformer.custom_mt_src_module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    shrinking.noise = BlankNoise(BLANK, 1.0, insert_share=1.0, seed=0)
    shrinking.forward_mt(tgt, tgt, pad_idx=PAD)
    assert (seen[0] == BLANK).sum() > 0
    for row, noisy in enumerate(seen[0]):
        kept = noisy[(noisy != BLANK) & (noisy != PAD)]
        assert torch.equal(kept, tgt[row][tgt[row] != PAD])
    shrinking.eval().forward_mt(tgt, tgt, pad_idx=PAD)
    assert torch.equal(seen[1], tgt)
    with pytest.raises(ValueError, match="blank_token 3 is pad_idx"):
        shrinking.forward_mt(tgt, tgt, pad_idx=BLANK)


def test_what_cannot_be_shrunk_is_refused(st_recipe):
    src, tgt, lens = batch()
    frames = torch.randn(3, 24, WIDTH)
    with pytest.raises(NotImplementedError, match="without their lengths"):
        st_recipe.shrinking.forward_mt_decoder_only(frames, tgt, pad_idx=PAD)
    with pytest.raises(ValueError, match="has no decoder"):
        Recipe({"num_decoder_layers": 0})
    # A searcher, or `modules`, with the model that was wrapped.
    bare = st_recipe.shrinking.transformer
    for call in (
        lambda: bare(src, tgt, lens),
        lambda: searcher(st_recipe, model=bare)(frames, lens),
    ):
        with pytest.raises(RuntimeError, match="called past it"):
            call()
    narrow = Recipe({})
    narrow.shrinking.looking_back = LookingBack(8, 2)
    with pytest.raises(ValueError, match="d_model 8, the frames are 32 wide"):
        narrow.shrinking(src, tgt, lens)
    with pytest.raises(AttributeError, match="no attribute 'forward_x'"):
        narrow.shrinking.forward_x(src)
    # An error in a step leaves nothing behind.
    narrow.shrinking.looking_back = LookingBack(WIDTH, 2)
    narrow.shrinking(src, tgt, lens)


def test_a_head_without_loss_is_reported(caplog):
    recipe = Recipe({}).train()
    src, tgt, lens = batch()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sum(recipe.losses(src, tgt, lens)).backward()
        assert "CTC has no loss" not in caplog.text
        for _ in range(3):
            recipe.shrinking(src, tgt, lens)[1].sum().backward()
    assert caplog.text.count("CTC has no loss") == 1


def test_a_head_that_is_not_saved_is_reported(caplog):
    recipe = Recipe({}).eval()
    src, tgt, lens = batch()
    without = torch.nn.ModuleList([recipe.shrinking, recipe.seq_lin])
    whole = torch.nn.ModuleList([recipe.shrinking, recipe.ctc_lin])
    with caplog.at_level(logging.WARNING), torch.no_grad():
        whole.load_state_dict(whole.state_dict())
        recipe.shrinking(src, tgt, lens)
        assert "none into the CTC head" not in caplog.text
        without.load_state_dict(without.state_dict())
        recipe.shrinking(src, tgt, lens)
    assert caplog.text.count("none into the CTC head") == 1


def test_looking_back_that_nothing_calls_is_reported(caplog):
    recipe = Recipe({})
    src, tgt, lens = batch()
    with caplog.at_level(logging.WARNING):
        recipe.eval()
        recipe.train()
        recipe.shrinking(src, tgt, lens)
        recipe.eval()
        # A model that is trained on text first has it for later.
        toy_model().train().eval()
        assert "A training passed" not in caplog.text
        modules = torch.nn.ModuleDict({"looking_back": LookingBack(8, 2)})
        modules.train()
        modules.eval()
    assert "A training passed without a call of LookingBack" in caplog.text


def test_copies_are_whole_and_apart():
    recipe = Recipe({})
    src, tgt, lens = batch()
    with torch.no_grad():
        searcher(recipe)(recipe.shrinking.encode(src, lens), lens)
    other = copy.deepcopy(recipe)
    assert other.shrinking._head.head is other.ctc_lin
    with torch.no_grad():
        other.ctc_lin.w.weight.zero_()
    one, two = (r.shrinking(src, tgt, lens)[1] for r in (recipe, other))
    assert not torch.allclose(one, two)
