"""The translation room on a GPU that is not there: devices and waits."""

import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import EACH, check, public_names, run

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from translation_toy import (  # noqa: E402
    BOS,
    EOS,
    Front,
    shrink_batch,
    toy_batch,
    toy_model,
)

from speechbrain_taskarith.translation import (  # noqa: E402
    AcousticEncoder,
    BlankNoise,
    CrossModalContrastiveLoss,
    CTCShrink,
    GradientAggregator,
    InputGuard,
    LocalExtractor,
    LocalToGlobal,
    LookingBack,
    ShrinkingTransformer,
    SpeechTranslationModel,
    TaskNormWeights,
    TextEncoder,
    TranslationBeamSearch,
    TranslationDecoder,
    TranslationObjective,
    WhisperAcousticEncoder,
    ctc_segments,
    distillation_loss,
    gradient_consistency,
    greedy_translation,
    window_entropy,
)

LENS = [13, 1, 7]


def acoustic(put):
    encoder = put(AcousticEncoder(Front(5, 8), 8))
    return encoder(put(torch.randn(2, 9, 5)), put(torch.tensor([1.0, 0.5])))


def whisper(put):
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        **{"d_model": 12, "encoder_layers": 2, "decoder_layers": 1},
        **{"encoder_ffn_dim": 8, "max_source_positions": 50},
    )
    torch.manual_seed(0)
    source = transformers.WhisperModel(config)
    encoder = put(WhisperAcousticEncoder(source, 8, trained_layers=1))
    x, lens = put(torch.randn(2, 3000)), put(torch.tensor([1.0, 0.5]))
    kept, counts = encoder.frozen(x, lens)
    return encoder(x, lens), encoder(kept, counts / kept.shape[1])


def shrink(pooling, capacity=None, window=None):
    def case(put):
        x, logits, lens = map(put, shrink_batch(LENS, dtype=torch.float32))
        x.requires_grad_()
        shrunk = CTCShrink(pooling=pooling, capacity=capacity)(x, logits, lens)
        look = put(LookingBack(4, 2, dropout=0.0, window=window))
        out = look(shrunk, x, lens)
        grad = torch.autograd.grad(out.square().mean(), x)
        return shrunk.x, shrunk.segments.owners(), out, grad

    return case


def segments(put):
    labels = put(torch.tensor([[0, 3, 3, 0, 3], [4, 4, 9, 9, 9]]))
    lengths = put(torch.tensor([5, 2]))
    some = ctc_segments(labels, lengths, capacity=3)
    return list(ctc_segments(labels, lengths)), list(some)


def text_side(put):
    local, encoder = LocalToGlobal(8, 2), TextEncoder(8, 2, 2)
    local, encoder = put(local).eval(), put(encoder).eval()
    decoder = put(TranslationDecoder(6, 8, 2, 1)).eval()
    x, lens = put(torch.randn(2, 9, 8)), put(torch.tensor([1.0, 0.5]))
    tokens = put(torch.tensor([[1, 3, 4], [1, 5, 5]]))
    encoded = encoder(x, lens)
    extracted = put(LocalExtractor(8, 5)).eval()(x, lens)
    return local(x, lens, 0), extracted, decoder(tokens, encoded, lens)


def noise(put):
    made = put(BlankNoise(0, probability=0.5, seed=1, punctuation=[9]))
    tokens = put(torch.tensor([[3, 4, 9], [5, 9, 0]]))
    return made(tokens, put(torch.tensor([1.0, 2 / 3])))


def training(put, **settings):
    model = toy_model(layers=1, width=8, **settings)
    assert isinstance(model, SpeechTranslationModel)
    model = put(model).eval()
    inputs, targets = (
        {name: put(tensor) for name, tensor in part.items()}
        for part in toy_batch(2)
    )
    out = model(tasks=("st", "asr", "mt"), **inputs)
    return TranslationObjective(0, distillation=0.5)(out, **targets)


def training_without_shrink(put):
    return training(put, shrink=False)


def loss_functions(put):
    speech, text = put(torch.randn(2, 5, 4)), put(torch.randn(2, 3, 4))
    lens = put(torch.tensor([1.0, 0.6]))
    labels = put(torch.tensor([[1, 2], [1, 2]]))
    contrast = put(CrossModalContrastiveLoss())(
        speech, lens, text, lens, labels, lens
    )
    return contrast, distillation_loss(speech, speech.flip(0), lens)


def two_losses(put):
    shared = put(torch.nn.Linear(4, 2))
    out = shared(put(torch.randn(3, 4)))
    return shared, {"st": out.square().sum(), "asr": out[:, 0].sum()}


def task_weights(put):
    shared, found = two_losses(put)
    weights = TaskNormWeights(["asr"], interval=1, average=1)
    weights.observe(found, {"acoustic": shared})
    total = weights.total(found)
    weights.step()
    return total, round(weights["asr"], 4)


def consistency(put):
    shared, found = two_losses(put)
    table = gradient_consistency(found, shared, by=lambda name: "all")
    (pairs,) = table.values()
    return [round(cosine, 4) for cosine in pairs.values()]


def aggregator(put):
    pytest.importorskip("torchjd", reason="TORCHJD ABSENT: extra translation")
    shared, found = two_losses(put)
    made = GradientAggregator("Mean")
    made.backward(found, shared)
    return shared.weight.grad, made.total(found, shared)


def searches(put):
    decoder = put(TranslationDecoder(6, 8, 2, 1)).eval()
    memory, lens = put(torch.randn(2, 3, 8)), put(torch.tensor([1.0, 0.7]))
    with torch.no_grad():
        greedy = greedy_translation(decoder, memory, lens, BOS, EOS, 4)
    return greedy


def beam_search(put):
    decoder = put(TranslationDecoder(6, 8, 2, 1)).eval()
    memory, lens = put(torch.randn(2, 3, 8)), put(torch.tensor([1.0, 0.7]))
    search = TranslationBeamSearch(decoder, BOS, EOS, 2, least_steps=4)
    return [[int(t) for t in one] for one in search(memory, lens)[0]]


def transformer(put):
    from speechbrain.lobes.models.transformer.TransformerASR import (
        TransformerASR,
    )

    # The head is among the recipe's modules, not one of the model's.
    head = put(torch.nn.Linear(8, 5))
    model = ShrinkingTransformer(
        TransformerASR(9, 20, 8, 2, 1, 1, 16, causal=False),
        head,
        CTCShrink(blank_index=0),
        LookingBack(8, nhead=2),
    )
    model = put(model).eval()
    tokens = put(torch.tensor([[1, 3, 4], [1, 5, 5]]))
    lens = put(torch.tensor([1.0, 0.5]))
    return model(put(torch.randn(2, 12, 20)), tokens, lens)


def guard(put):
    x = put(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]))
    good = InputGuard(skip_bad=True)(["a", "b"], x, put(torch.ones(2)))
    return good.tolist()


def entropy(put):
    x, lens = put(torch.eye(4).repeat(2, 1)[None]), put(torch.ones(1))
    return round(window_entropy(x, lens, [4])[4], 4)


CASES = {
    "AcousticEncoder": acoustic,
    "WhisperAcousticEncoder": whisper,
    **{
        f"CTCShrink, {pooling}": shrink(pooling)
        for pooling in ("first", "mean", "weighted", "softmax")
    },
    "CTCShrink with a capacity": shrink("mean", capacity=8),
    "LookingBack in a window": shrink("first", window=1),
    "ctc_segments": segments,
    "text side": text_side,
    "BlankNoise": noise,
    "model and TranslationObjective": training,
    "the same without shrink": training_without_shrink,
    "losses": loss_functions,
    "TaskNormWeights": task_weights,
    "gradient_consistency": consistency,
    "GradientAggregator": aggregator,
    "greedy_translation": searches,
    "TranslationBeamSearch": beam_search,
    "ShrinkingTransformer": transformer,
    "InputGuard": guard,
    "window_entropy": entropy,
}
REASONS = {
    "ConsistencyProbe": "gradient_consistency, into a file",
    "EncoderCache": "writes what the encoder's frozen part returns",
    "TargetLanguages": "tokens, on the CPU as a batch's labels are",
    "Segments": "what ctc_segments returns",
    "Shrunk": "what CTCShrink returns",
    "SpeechTranslator": "what comes out are numbers of Python",
    "TranslatedSegment": "numbers of Python",
    "Translation": "numbers of Python",
    "initialise_from_text_translation": "reads a file, once",
    "plot_task_weights": "draws numbers of Python",
    "plot_window_entropy": "draws numbers of Python",
    "save_translator": "writes files, once",
    "write_task_weights": "writes numbers of Python",
}
SHRINK = {"translation.reduction.shrink._check": 1}
CTC = {
    "translation.losses._ctc": 1,
    "translation.multitask.ctc_loss.forward": 2,
}
SEARCH = "translation.search.searchers."
WAITS = {
    **dict.fromkeys(CASES, {}),
    "WhisperAcousticEncoder": {
        "translation.encoders.whisper._make_constants": 2
    },
    **{name: SHRINK for name in CASES if name.startswith("CTCShrink, ")},
    "LookingBack in a window": SHRINK,
    "ShrinkingTransformer": SHRINK,
    "ctc_segments": {"translation.reduction.segments.ctc_segments": 1},
    "BlankNoise": {
        "translation.text.noise._draw": 1,
        "translation.text.noise._insert": 1,
    },
    "model and TranslationObjective": SHRINK | CTC,
    "the same without shrink": CTC,
    "TaskNormWeights": {"translation.multitask.norms._norm": 2},
    "gradient_consistency": {"translation.multitask.consistency._cosine": 1},
    "greedy_translation": {
        "translation.search.searchers.greedy_translation": EACH
    },
    # Upstream's, each under the function of ours that calls it.
    "TranslationBeamSearch": {
        SEARCH + "forward": EACH,
        SEARCH + "search_step": EACH,
        SEARCH + "_set_steps": 1,
        SEARCH + "_fill": EACH,
        SEARCH + "_update_hyps_and_scores_if_eos_token": EACH,
    },
    "InputGuard": {"translation.input_guard._bad_features": 1},
    "window_entropy": {"translation.reduction.entropy.window_entropy": EACH},
}


@pytest.mark.parametrize("name", CASES)
def test_devices_and_waits(name):
    check(run(CASES[name]), WAITS[name])


def test_everything_public_is_here():
    public = public_names("translation")
    assert public == {n for n in public if n in globals()} | set(REASONS)
    assert not set(REASONS) & set(globals())
