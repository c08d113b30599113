"""The whole model: tasks, positions, encoders, search, initialisation."""

import math
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.decoders.seq2seq import S2STransformerBeamSearcher
from translation_toy import BOS, EOS, toy_batch, toy_model

from speechbrain_taskarith.translation import (
    AcousticEncoder,
    BlankNoise,
    CTCShrink,
    InputGuard,
    LookingBack,
    SpeechTranslationModel,
    TextEncoder,
    TranslationBeamSearch,
    TranslationDecoder,
    TranslationObjective,
    greedy_translation,
    initialise_from_text_translation,
)
from speechbrain_taskarith.translation.search.incremental import (
    IncrementalDecoder,
    PrefixDecoder,
    decoder_by_steps,
)


def test_only_what_is_asked_for_is_computed():
    model = toy_model()
    inputs, _ = toy_batch()
    out = model(tasks=("st",), **inputs)
    assert out.mt is None and out.st is not None
    assert not out.text.encoded.requires_grad
    untranscribed = {k: v for k, v in inputs.items() if k[:6] != "source"}
    assert model(tasks=("st",), **untranscribed).text is None
    out = model(tasks=("mt",), **inputs)
    assert out.speech is None and out.st is None
    out = model(tasks=("asr",), **inputs)
    assert not out.text.encoded.requires_grad and out.mt is None
    plain = toy_model(contrast=False)
    assert plain(tasks=("asr",), **inputs).text is None


def test_every_part_of_the_method_learns():
    model = toy_model(noise=BlankNoise(0, probability=0.5))
    inputs, targets = toy_batch()
    losses = TranslationObjective(0)(
        model(tasks=("st", "asr", "mt"), **inputs), **targets
    )
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize(
    "shrink, look, local", [(0, 0, 1), (1, 0, 1), (1, 1, 0)]
)
def test_parts_may_be_left_out(shrink, look, local):
    model = toy_model(shrink=shrink, look=look, local=local)
    inputs, targets = toy_batch()
    out = model(tasks=("st", "asr", "mt"), **inputs)
    losses = TranslationObjective(0)(out, **targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert (out.speech.segments is None) == (not shrink)
    if not shrink:
        assert out.speech.encoded.shape[1] == out.speech.logits.shape[1]


def test_decoder_sees_positions():
    model = toy_model().eval()
    memory = torch.randn(1, 5, 16)
    same = torch.full((1, 4), 7)
    scores = model.decoder(same, memory, torch.ones(1))[0]
    # Equal tokens before equal tokens: only positions tell them apart.
    assert (scores[1:] - scores[:-1]).abs().amax(-1).min() > 1e-4


def test_decoder_is_causal_and_masks_memory():
    model = toy_model().eval()
    memory, lens = torch.randn(2, 5, 16), torch.tensor([1.0, 0.4])
    tokens = torch.randint(3, 8, (2, 6))
    scores = model.decoder(tokens, memory, lens)
    later = tokens.clone()
    later[:, 4:] = 3
    assert torch.equal(model.decoder(later, memory, lens)[:, :4], scores[:, :4])
    other = memory.clone()
    other[1, 2:] = 100.0
    torch.testing.assert_close(model.decoder(tokens, other, lens), scores)
    alone = model.decoder(tokens[1:], memory[1:, :2], torch.ones(1))
    torch.testing.assert_close(alone, scores[1:])


def test_padding_of_speech_changes_nothing():
    model = toy_model().eval()
    inputs, _ = toy_batch()
    # Without the toy's convolution in front, which knows no lengths.
    frames = torch.randn(2, 9, 16)
    lens = torch.tensor([1.0, 5 / 9])
    model.acoustic = AcousticEncoder(Same(), 16)
    clean = model.encode_speech(frames, lens)
    junk = frames.clone()
    junk[1, 5:] = math.nan
    noisy = model.encode_speech(junk, lens)
    assert torch.equal(noisy.encoded, clean.encoded)
    alone = model.encode_speech(frames[1:, :5], torch.ones(1))
    count = int(clean.segments.lengths[1])
    torch.testing.assert_close(
        clean.encoded[1:, :count], alone.encoded, rtol=1e-4, atol=1e-5
    )


class Same(torch.nn.Module):
    def forward(self, x, lens):
        return x


class BadPadding(torch.nn.Module):
    """An encoder whose padding is NaN, as attention's may be."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 12)

    def forward(self, x, lens):
        count = (lens * x.shape[1]).round().long()
        outside = torch.arange(x.shape[1]) >= count[:, None]
        return self.linear(x).masked_fill(outside[..., None], math.nan)


@pytest.mark.parametrize(
    "shrink",
    [
        None,
        CTCShrink(),
        CTCShrink(pooling="weighted", train_weights=True),
        CTCShrink(pooling="softmax", train_weights=True, drop_blank=True),
    ],
)
def test_nan_in_padding_reaches_no_gradient(shrink):
    model = toy_model(shrink=shrink is not None).double()
    model.shrink = shrink
    model.acoustic = AcousticEncoder(BadPadding(), 16, d_encoder=12).double()
    inputs, targets = toy_batch(batch=2)
    inputs["x"] = inputs["x"].double()
    objective = TranslationObjective(0, contrastive=0.0)

    def gradients(inputs, targets):
        model.zero_grad()
        out = model(tasks=("st", "asr", "mt"), **inputs)
        sum(objective(out, **targets).values()).backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }

    padded = gradients(inputs, targets)
    # Each utterance alone has no padding.
    singles = []
    for row, frames, words in ((0, 12, 5), (1, 24, 3)):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        aim = {k: v[row : row + 1] for k, v in targets.items()}
        one["x"], one["lens"] = one["x"][:, :frames], torch.ones(1)
        for part in (one, aim):
            part["source"] = part["source"][:, :words]
            part["source_lens"] = torch.ones(1)
        singles.append(gradients(one, aim))
    assert padded["acoustic.encoder.linear.weight"].abs().max() > 0
    for name, grad in padded.items():
        expected = (singles[0][name] + singles[1][name]) / 2
        torch.testing.assert_close(grad, expected, msg=name)


def test_searches_agree_with_a_loop():
    torch.manual_seed(1)
    model = toy_model(seed=3).eval()
    inputs, _ = toy_batch()
    speech = model.encode_speech(inputs["x"], inputs["lens"])
    args = (model.decoder, speech.encoded, speech.lens, BOS, EOS)
    found = greedy_translation(*args, max_tokens=7)
    for b in range(4):
        tokens = [BOS]
        for _ in range(7):
            scores = model.decoder(
                torch.tensor([tokens]),
                speech.encoded[b : b + 1],
                speech.lens[b : b + 1],
            )
            best = int(scores[0, -1].argmax())
            if best == EOS:
                break
            tokens.append(best)
        assert found[b] == tokens[1:]
    beam = TranslationBeamSearch(
        model.decoder,
        BOS,
        EOS,
        beam_size=1,
        max_decode_ratio=0.0,
        least_steps=7,
    )
    hypotheses, _, _, _ = beam(speech.encoded, speech.lens)
    assert [[int(token) for token in tokens] for tokens in hypotheses] == found
    assert max(map(len, found)) == 7, "none is cut"
    short = TranslationDecoder(8, 16, 2, 1, max_length=5)
    limited = TranslationBeamSearch(short, BOS, EOS, least_steps=50)
    assert limited.change_max_decoding_length(0, 2) == (0, 5)


class WholePrefixes(TranslationBeamSearch):
    """The same search as SpeechBrain does it: every prefix anew."""

    forward_step = S2STransformerBeamSearcher.forward_step
    permute_mem = S2STransformerBeamSearcher.permute_mem


@pytest.mark.parametrize("beam_size", [1, 4])
def test_beam_search_agrees_with_whole_prefixes(beam_size):
    torch.manual_seed(4)
    decoder = TranslationDecoder(9, 16, 4, num_layers=2).double().eval()
    memory = torch.randn(3, 6, 16).double()
    lens = torch.tensor([1.0, 0.5, 1 / 6])
    settings = {"beam_size": beam_size, "max_decode_ratio": 0.0}
    found, expected = (
        which(decoder, BOS, EOS, least_steps=12, **settings)(memory, lens)
        for which in (TranslationBeamSearch, WholePrefixes)
    )
    assert found[0] == expected[0]
    torch.testing.assert_close(found[2], expected[2])


def test_speechbrains_searcher_takes_the_decoder():
    torch.manual_seed(4)
    decoder = TranslationDecoder(9, 16, 4, num_layers=2).double().eval()
    memory, lens = torch.randn(3, 6, 16).double(), torch.tensor([1, 0.5, 0.5])
    marks = {"bos_index": BOS, "eos_index": EOS, "beam_size": 3}
    settings = {"max_decode_ratio": 2.0, "min_decode_ratio": 0.0}
    stock = S2STransformerBeamSearcher(
        [decoder, decoder.seq_lin],
        using_eos_threshold=False,
        **{**marks, **settings},
    )
    own = TranslationBeamSearch(decoder, least_steps=0, **marks)
    # One by one: upstream's limit of a batch is that of the longest.
    sizes = (6 * lens).round().long().tolist()
    alone = [
        stock(memory[i : i + 1, :size], torch.ones(1))
        for i, size in enumerate(sizes)
    ]
    hypotheses, scores = [one[0][0] for one in alone], [o[2] for o in alone]
    found, expected = own(memory, lens), (hypotheses, None, torch.cat(scores))
    # Upstream's loses the last token of one that is cut.
    cut = [len(t) == most for t, most in zip(found[0], own.most_steps)]
    for tokens, other, is_cut in zip(found[0], expected[0], cut):
        assert tokens[: len(tokens) - is_cut] == other
    assert any(found[0])
    torch.testing.assert_close(found[2], expected[2])


def test_a_decoder_in_training_mode_is_not_searched():
    decoder = TranslationDecoder(9, 16, 4, num_layers=2)
    memory, lens = torch.randn(2, 6, 16), torch.ones(2)
    search = TranslationBeamSearch(decoder, BOS, EOS, beam_size=2)
    with pytest.raises(RuntimeError, match="the decoder is in training mode"):
        search(memory, lens)
    decoder.eval()
    search(memory, lens)
    decoder.layers.layers[1].train()
    with pytest.raises(RuntimeError, match="decoder.layers.layers.1 is in tr"):
        greedy_translation(decoder, memory, lens, BOS, EOS)


def test_incremental_steps_equal_whole_prefixes():
    torch.manual_seed(5)
    decoder = TranslationDecoder(9, 16, 4, num_layers=2, max_length=7)
    decoder = decoder.double().eval()
    memory, lengths = torch.randn(4, 6, 16).double(), torch.tensor([6, 1, 3, 4])
    # What pads the memory is not seen.
    memory[1, 1:] = 1e3
    tokens = torch.randint(3, 9, (4, 7))
    tokens[:, 0] = BOS
    steps = decoder_by_steps(decoder, memory, lengths)
    assert isinstance(steps, IncrementalDecoder)
    rows = torch.arange(4)
    for u in range(7):
        if u == 3:  # one twice, in another order, two not at all
            rows = torch.tensor([2, 0, 2])
            assert steps.select(rows) is steps
        elif u == 5:
            rows = rows[torch.tensor([True, False, True])]
            steps.select(torch.tensor([True, False, True]))
        hidden, attention = steps.step(tokens[rows, u])
        expected = decoder.decode(
            tokens[rows, : u + 1], memory[rows], lengths[rows]
        )
        torch.testing.assert_close(hidden, expected[0][:, -1])
        torch.testing.assert_close(attention, expected[1][:, -1])
    with pytest.raises(ValueError, match="8 steps, but positions up to 7"):
        steps.step(tokens[rows, 0])


def test_changed_decoder_layers_are_searched_as_they_are():
    torch.manual_seed(6)
    decoder = TranslationDecoder(9, 16, 4, num_layers=1).eval()
    memory, lens = torch.randn(2, 6, 16), torch.tensor([1.0, 0.5])
    args = (decoder, memory, lens, BOS, EOS)
    plain = greedy_translation(*args, max_tokens=9)
    layer = decoder.layers.layers[0]
    # An adapter by a hook, as some libraries add it.
    hook = layer.register_forward_hook(lambda _, x, y: (-3 * y[0], *y[1:]))
    steps = decoder_by_steps(decoder, memory, torch.tensor([6, 3]))
    assert isinstance(steps, PrefixDecoder)
    hooked = greedy_translation(*args, max_tokens=9)
    assert hooked != plain
    tokens = torch.tensor([[BOS]] * 2)
    first = decoder(tokens, memory, lens)[:, -1].argmax(-1)
    assert [one[0] for one in hooked] == first.tolist()
    hook.remove()
    assert greedy_translation(*args, max_tokens=9) == plain


def test_starts_from_a_text_translation_model(tmp_path):
    trained, fresh = toy_model(seed=5), toy_model(seed=6)
    inputs, _ = toy_batch()
    path = tmp_path / "model.ckpt"
    torch.save(trained.state_dict(), path)
    acoustic = {n: p.clone() for n, p in fresh.acoustic.named_parameters()}
    taken = initialise_from_text_translation(fresh, tmp_path)
    assert {name.split(".")[0] for name in taken} == {
        "source_embedding",
        "textual",
        "decoder",
    }
    a = trained.eval()(tasks=("mt",), **inputs).mt
    assert torch.equal(fresh.eval()(tasks=("mt",), **inputs).mt, a)
    for name, p in fresh.acoustic.named_parameters():
        assert torch.equal(p, acoustic[name])
    # From what DDP saved, and from safetensors.
    from safetensors.torch import save_file

    other = toy_model(seed=7)
    state = {f"module.{n}": t for n, t in trained.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    initialise_from_text_translation(other, tmp_path / "m.safetensors")
    assert torch.equal(other.decoder.seq_lin.bias, trained.decoder.seq_lin.bias)


def test_what_does_not_fit_is_not_loaded(tmp_path):
    fresh, smaller = toy_model(seed=6), toy_model(target_vocab=7)
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    with pytest.raises(ValueError, match="seq_lin.weight: .7, 16., expected"):
        initialise_from_text_translation(fresh, smaller)
    with pytest.raises(ValueError, match="missing: textual.local"):
        initialise_from_text_translation(fresh, toy_model(local=False))
    with pytest.raises(ValueError, match="left over: textual.local.layers.2"):
        initialise_from_text_translation(fresh, toy_model(layers=3))
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="bad.ckpt: not readable"):
        initialise_from_text_translation(fresh, bad)
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    with pytest.raises(ValueError, match="not readable as tensors"):
        initialise_from_text_translation(fresh, tmp_path / "bad.safetensors")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        initialise_from_text_translation(fresh, tmp_path / "none.ckpt")
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_speechbrain_conformer_as_acoustic_encoder():
    from speechbrain.lobes.models.transformer.TransformerASR import (
        EncoderWrapper,
        TransformerASR,
    )

    conformer = EncoderWrapper(
        TransformerASR(
            tgt_vocab=5,
            input_size=8,
            d_model=12,
            nhead=2,
            num_encoder_layers=1,
            num_decoder_layers=0,
            d_ffn=16,
            encoder_module="conformer",
            attention_type="RelPosMHAXL",
            normalize_before=True,
            causal=False,
        )
    )
    acoustic = AcousticEncoder(conformer, 16, d_encoder=12)
    check_acoustic(acoustic, torch.randn(2, 20, 8))


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
def test_a_folder_of_transformers_as_acoustic_encoder(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    name = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[kind]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    from speechbrain.integrations.huggingface import hubert, wav2vec2

    kinds = {"hubert": hubert.HuBERT, "wav2vec2": wav2vec2.Wav2Vec2}
    encoder = kinds[kind](
        source=str(tmp_path), save_path=str(tmp_path / "x"), freeze=False
    )
    check_acoustic(AcousticEncoder(encoder, 16, 12), torch.randn(2, 1200))


def check_acoustic(acoustic, x):
    model = SpeechTranslationModel(
        acoustic,
        TextEncoder(16, 2, 1),
        TranslationDecoder(8, 16, 2, 1),
        source_vocab=6,
        shrink=CTCShrink(),
        looking_back=LookingBack(16, 2),
    )
    inputs, targets = toy_batch(2)
    inputs.update(x=x, lens=torch.tensor([1.0, 0.6]))
    out = model(tasks=("st", "asr"), **inputs)
    sum(TranslationObjective(0)(out, **targets).values()).backward()
    grads = [p.grad for p in acoustic.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_guard_names_or_leaves_out(caplog):
    x = torch.randn(4, 6, 2)
    x[1, 5] = math.nan
    lens = torch.tensor([1.0, 0.5, 0.0, 1.0])
    ids, good = ["a", "b", "c", "d"], ["x"] * 4
    args = (ids, x, lens, good, ["y", "y", "y", ""])
    with pytest.raises(ValueError, match="utterance 'c': its length is 0"):
        InputGuard()(*args)
    guard = InputGuard(skip_bad=True)
    assert guard(*args).tolist() == [0, 1], "NaN in padding is no harm"
    assert "'d' is left out: it has no translation" in caplog.text
    assert guard.summary().startswith("2 utterance(s) left out: 1 (its length")
    assert guard(ids[:1], x[:1], lens[:1]) is None
    lens[1] = 1.0
    with pytest.raises(ValueError, match="'b': NaN or infinity"):
        InputGuard()(ids, x, lens)
    with pytest.raises(ValueError, match="all utterances .* are bad: a, b"):
        guard(ids[:2], transcripts=[None, ""])
    # Waveforms, too.
    wav = torch.tensor([[0.0, math.inf]])
    with pytest.raises(ValueError, match="NaN or infinity"):
        InputGuard()(["a"], wav, torch.ones(1))


def test_bad_input():
    model = toy_model()
    inputs, _ = toy_batch()
    with pytest.raises(ValueError, match="unknown task 'slu'"):
        model(tasks=("slu",), **inputs)
    with pytest.raises(ValueError, match="task 'mt' needs source"):
        model(tasks=("mt",), **{**inputs, "source": None})
    with pytest.raises(ValueError, match="task 'st' needs target_bos"):
        model(tasks=("st",), **{**inputs, "target_bos": None})
    for shrink in (True, False):
        for length in (0.0, math.nan, 1.5):
            lens = torch.tensor([1.0, length, 1.0, 1.0])
            with pytest.raises(ValueError, match="row 1 .* have a length of"):
                toy_model(shrink=shrink)(**{**inputs, "lens": lens})
    # Less than half a frame is a frame.
    short = {**inputs, "lens": torch.tensor([1.0, 0.01, 1.0, 1.0])}
    assert model(**short).speech.segments.frame_lengths.tolist()[1] == 1
    inputs["x"][2] = math.nan
    with pytest.raises(ValueError, match="scores of utterance 'u2' are NaN"):
        model(tasks=("st",), ids=["u0", "u1", "u2", "u3"], **inputs)
    with pytest.raises(ValueError, match="noise's blank is 3"):
        toy_model(noise=BlankNoise(3))
    with pytest.raises(ValueError, match="looking_back without shrink"):
        SpeechTranslationModel(
            Same(),
            TextEncoder(8, 2, 1),
            TranslationDecoder(5, 8, 2, 1),
            4,
            looking_back=LookingBack(8, 2),
        )
    with pytest.raises(ValueError, match="give its width as d_encoder"):
        AcousticEncoder(Same(), 4)(torch.rand(1, 3, 5), torch.ones(1))


def test_the_fragment_is_the_model():
    root = Path(__file__).parents[2]
    text = f"""
acoustic: !new:speechbrain_taskarith.translation.AcousticEncoder
    encoder: !new:translation_toy.Front {{features: 5, width: 16}}
    d_model: 16
translation: !include:{root}/hparams/translation/joint.yaml
    d_model: 16
    nhead: 2
    d_ffn: 32
    num_encoder_layers: 2
    num_decoder_layers: 1
    source_vocab: 6
    target_vocab: 8
    interval: 1
model: !new:speechbrain_taskarith.translation.SpeechTranslationModel
    acoustic: !ref <acoustic>
    textual: !ref <translation[textual]>
    decoder: !ref <translation[decoder]>
    source_vocab: 6
    shrink: !ref <translation[shrink]>
    looking_back: !ref <translation[looking_back]>
    noise: !ref <translation[noise]>
"""
    loaded = load_hyperpyyaml(text)
    made, model = loaded["translation"], loaded["model"]
    weights = made["task_weights"]
    assert model.textual is made["textual"], "one object, not a copy"
    inputs, targets = toy_batch()
    losses = made["objective"](model(tasks=weights.active, **inputs), **targets)
    weights.observe(losses, model.parts())
    weights.total(losses).backward()
    weights.step()
    assert set(losses) == {"st", "asr", "mt"} and weights.updates == 1
    assert model.shrink.uniform == 8 and model.noise.blank_token == 0


@pytest.mark.parametrize(
    "names, settings",
    [
        (["shrink"], {"shrink": False}),
        (["shrink", "looking_back"], {"shrink": False}),
        (["looking_back"], {"look": False}),
        ([], {}),
    ],
)
def test_training_without_a_part_is_that_of_a_model_without_it(names, settings):
    inputs, _ = toy_batch()
    model = toy_model()
    less = toy_model(**settings)
    less.load_state_dict(model.state_dict(), strict=False)
    model.leave_out(names)
    found, expected = model(**inputs), less(**inputs)
    torch.testing.assert_close(found.st, expected.st)
    torch.testing.assert_close(found.speech.embedded, expected.speech.embedded)
    # Evaluation has all parts; so has training, when called again.
    whole = toy_model().eval()
    assert torch.equal(model.eval()(**inputs).st, whole(**inputs).st)
    model.leave_out(())
    assert torch.equal(model.train()(**inputs).st, whole.train()(**inputs).st)


def test_noise_can_be_left_out_and_other_parts_cannot():
    inputs, _ = toy_batch()
    model = toy_model(noise=BlankNoise(0, probability=1.0, insert_share=1.0))
    width = inputs["source"].shape[1]
    encoded = model(tasks=("mt",), **inputs).text.encoded
    assert encoded.shape[1] > width
    model.leave_out(["noise"])
    assert model(tasks=("mt",), **inputs).text.encoded.shape[1] == width
    with pytest.raises(ValueError, match="'decoder' cannot .* shrink, look"):
        model.leave_out(["decoder"])
