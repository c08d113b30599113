"""The transducer room on a GPU that is not there: devices and waits."""

import pytest
import torch
from fake_cuda import EACH, check, public_names, run

from speechbrain_taskarith.transducer import (
    ChunkedEncoder,
    Emformer,
    HATJoint,
    HATOutput,
    LocalFbank,
    LSTMPredictor,
    MinWERLoss,
    RNNTJoint,
    SpeechBrainJoint,
    SpeechBrainPredictor,
    StreamingTransducer,
    TimeReduction,
    TransducerBeamSearch,
    TransducerGreedySearch,
    TransducerSampler,
    alignment_windows,
    joint_transducer_loss,
    lattice_log_prob,
    min_wer_loss,
    sequence_log_prob,
    transducer_loss,
)

LENS, LABELS = [1.0, 0.5, 0.75], [1.0, 0.4, 0.0]


def batch(put, width=6):
    """Return encoder output, targets, and their relative lengths."""
    x = torch.randn(3, 6, width)
    y = torch.randint(1, 9, (3, 5))
    lens, labels = torch.tensor(LENS), torch.tensor(LABELS)
    return put(x).requires_grad_(), *map(put, (y, lens, labels))


def loss_and_gradient(loss, *inputs):
    return loss, torch.autograd.grad(loss, inputs)


def networks(put, kind=RNNTJoint, **options):
    predictor = LSTMPredictor(9, 4, 5, num_layers=1)
    joint = kind(6, 5, 8, 9, **options)
    with torch.no_grad():
        joint.output.weight *= 6
    return put(predictor), put(joint)


def hypotheses(found):
    return [[one.tokens for one in each] for each in found]


def dense_loss(put, **options):
    _, y, lens, labels = batch(put)
    logits = put(torch.randn(3, 6, 6, 9)).requires_grad_()
    loss = transducer_loss(logits, y, lens, labels, 0, **options)
    return loss_and_gradient(loss, logits)


def dense_loss_in_windows(put):
    ends = put(torch.tensor([[1, 3, 5, 7, 9], [0, 2, 0, 0, 0], [0] * 5]))
    windows = alignment_windows(ends, 2, 3)
    return dense_loss(put, windows=windows, zero_infinity=True)


def chunked_loss(put, kind=RNNTJoint, **options):
    x, y, lens, labels = batch(put)
    predictor, joint = networks(put, kind, **options)
    g = predictor(torch.nn.functional.pad(y, (1, 0)))[0]
    loss = joint_transducer_loss(joint, x, g, y, lens, labels, 0)
    return loss_and_gradient(loss, x, joint.output.weight)


def chunked_hat_loss(put):
    return chunked_loss(put, HATJoint, blank_index=0)


def speechbrain_loss(put):
    from speechbrain.nnet.embedding import Embedding
    from speechbrain.nnet.RNN import LSTM
    from speechbrain.nnet.transducer.transducer_joint import Transducer_joint

    x, y, lens, labels = batch(put)
    embedding = Embedding(9, 8, consider_as_one_hot=True, blank_id=0)
    layers = [embedding, LSTM(hidden_size=6, input_size=8)]
    predictor = put(SpeechBrainPredictor(layers))
    tied = Transducer_joint(joint="sum", nonlinearity=torch.nn.Tanh)
    joint = put(SpeechBrainJoint(tied, torch.nn.Linear(6, 9)))
    g, _ = predictor(torch.nn.functional.pad(y, (1, 0)))
    return joint_transducer_loss(joint, x, g, y, lens, labels, 0)


def log_prob_of_sequences(put):
    x, y, _, _ = batch(put)
    predictor, joint = networks(put)
    g = predictor(torch.nn.functional.pad(y, (1, 0)))[0]
    frames, labels = put(torch.tensor([6, 4])), put(torch.tensor([5, 2, 0]))
    rows = put(torch.tensor([0, 0, 1]))
    return sequence_log_prob(
        joint, x[:2], g, y, frames, labels, encoder_rows=rows
    )


def lattice(put):
    blank, label = put(-torch.rand(2, 4, 3)), put(-torch.rand(2, 4, 2))
    frames, labels = put(torch.tensor([4, 3])), put(torch.tensor([2, 0]))
    return lattice_log_prob(blank, label, frames, labels)


def joints(put):
    _, joint = networks(put)
    x, g = put(torch.randn(2, 4, 1, 6)), put(torch.randn(2, 1, 3, 5))
    hat = put(HATJoint(6, 5, 8, 9, blank_index=0))
    output = put(HATOutput(6, 9, blank_index=0))
    return joint(x, g), joint.internal_lm(g), hat(x, g), output(x)


def predictors(put):
    predictor, _ = networks(put)
    return predictor(put(torch.zeros(2, 3, dtype=torch.long)))


def search(kind, **options):
    def decode(put):
        predictor, joint = networks(put)
        x, _, lens, _ = batch(put)
        searcher = kind(predictor, joint, 0, **options)
        return hypotheses(searcher.decode(3 * x, lens))

    return decode


def min_wer(put, source="beam"):
    x, y, lens, labels = batch(put)
    predictor, joint = networks(put)
    kind = TransducerSampler if source == "sample" else TransducerBeamSearch
    labels = labels.clamp(min=0.2)
    loss = MinWERLoss(
        kind(predictor, joint, 0), n_best=2, source=source, max_symbols=2
    )
    return loss_and_gradient(loss(x, lens, y, labels), x)


def min_wer_by_sampling(put):
    return min_wer(put, "sample")


def n_best_loss(put):
    scores = put(torch.randn(2, 3)).requires_grad_()
    errors = put(torch.tensor([[0, 1, 2], [3, 1, 0]]))
    mask = put(torch.tensor([[True, True, True], [True, False, False]]))
    return loss_and_gradient(min_wer_loss(scores, errors, mask), scores)


def emformer(put):
    encoder = put(Emformer(6, 2, 16, 2, 4, 1, 4, 2))
    x, _, lens, _ = batch(put)
    out = encoder(x, lens)
    return loss_and_gradient(out.square().mean(), x)


def emformer_stream(put):
    encoder = put(Emformer(6, 2, 16, 2, 4, 1, 4, 2)).eval()
    context = encoder.make_streaming_context(2)
    x = put(torch.randn(2, 5, 6))
    return [encoder.forward_streaming(x, context) for _ in range(2)]


def conformer():
    from speechbrain.lobes.models.transformer.TransformerASR import (
        TransformerASR,
    )

    return ChunkedEncoder(
        TransformerASR(
            tgt_vocab=5,
            input_size=6,
            d_model=8,
            nhead=2,
            num_encoder_layers=1,
            num_decoder_layers=0,
            d_ffn=16,
            attention_type="RelPosMHAXL",
            positional_encoding=None,
            encoder_module="conformer",
            normalize_before=True,
            causal=False,
        ),
        chunk_size=4,
        left_context=1,
    )


def chunked_encoder(put):
    encoder = put(conformer()).eval()
    x, _, lens, _ = batch(put)
    return encoder(x, lens)


def chunked_encoder_stream(put):
    encoder = put(conformer()).eval()
    context = encoder.make_streaming_context()
    x = put(torch.randn(1, 4, 6))
    return [encoder.forward_streaming(x, context) for _ in range(2)]


def front_end(put):
    features = put(LocalFbank(n_mels=20, n_fft=400))
    reduction = put(TimeReduction(20, 16))
    x = features(put(torch.randn(2, 3200)))
    return reduction(x, put(torch.tensor([1.0, 0.5])))


def recogniser(put):
    predictor = LSTMPredictor(9, 4, 5, num_layers=1)
    joint = RNNTJoint(16, 5, 8, 9)
    model = StreamingTransducer(
        LocalFbank(n_mels=20, n_fft=400),
        Emformer(16, 4, 32, 2, 4, 1, 8, 2),
        TransducerGreedySearch(predictor, joint, 0, 2),
        lambda tokens: " ".join(map(str, tokens)),
        frontend=TimeReduction(20, 16),
    )
    model = put(model).eval()
    wave = torch.randn(3200)
    stream = model.stream()
    for part in wave.split(1600):
        stream.feed(part)
    text = stream.finish().text
    assert text == model.transcribe(wave)
    return text


CASES = {
    "transducer_loss": dense_loss,
    "transducer_loss, windows": dense_loss_in_windows,
    "joint_transducer_loss": chunked_loss,
    "joint_transducer_loss, HAT": chunked_hat_loss,
    "joint_transducer_loss, SpeechBrain's layers": speechbrain_loss,
    "sequence_log_prob": log_prob_of_sequences,
    "lattice_log_prob": lattice,
    "joints": joints,
    "predictors": predictors,
    "TransducerGreedySearch": search(TransducerGreedySearch, max_symbols=2),
    "TransducerBeamSearch": search(TransducerBeamSearch, beam_size=2),
    "TransducerSampler": search(TransducerSampler, n_best=2, max_symbols=3),
    "MinWERLoss": min_wer,
    "MinWERLoss, sampled": min_wer_by_sampling,
    "min_wer_loss": n_best_loss,
    "Emformer": emformer,
    "Emformer, a stream": emformer_stream,
    "ChunkedEncoder": chunked_encoder,
    "ChunkedEncoder, a stream": chunked_encoder_stream,
    "LocalFbank, TimeReduction": front_end,
    "StreamingTransducer": recogniser,
}


# Names without a case of their own.
REASONS = {
    "Hypothesis": "what searches return: numbers of Python",
    "SearchResult": "what searches return: numbers of Python",
    "PartialResult": "what a stream returns: numbers of Python",
    "LabelText": "turns a list of numbers into text",
    "SentencePieceText": "turns a list of numbers into text",
    "TransferReport": "names of tensors",
    "transfer_encoder": "reads a file, once",
    "export_transducer": "reads and writes files, on the CPU",
    "ExportReport": "numbers of Python",
}
TARGETS = {"transducer.loss.input_checks.check_targets": 1}
DENSE = TARGETS | {"transducer.loss.transitions.forward": 1}
STEADY = {"transducer.joints.checks._check_steady": 1}
NODES = TARGETS | STEADY | {"transducer.joints.chunked_loss.__init__": 1}
ACTIVE = {"transducer.joints.chunked_loss._active": 1}
LENGTHS = {"transducer.loss.input_checks.checked_lengths": 1}
FINITE = {
    "transducer.search.searcher.only_valid": EACH,
    "transducer.search.searcher.check_scores": EACH,
}
GREEDY = FINITE | {
    "transducer.search.greedy.advance": EACH,
    "transducer.search.greedy._step": EACH,
}
BEAM = FINITE | {
    "transducer.search.beam.advance": EACH,
    "transducer.search.beam._frame": EACH,
    "transducer.search.prefixes.extend": EACH,
    "transducer.search.prefixes.add": EACH,
    "transducer.search.beam.results": EACH,
}
SAMPLE = GREEDY | {"transducer.search.greedy._choose": EACH}
MIN_WER = {
    "transducer.training.min_wer.forward": EACH,
    "transducer.training.min_wer._log_probs": EACH,
    "transducer.training.expected_errors.tables": EACH,
}
# Before the search, and of what it found.
TWICE = dict.fromkeys(TARGETS, 2)
WAITS = {
    **dict.fromkeys(CASES, {}),
    "transducer_loss": DENSE,
    "transducer_loss, windows": DENSE,
    "joint_transducer_loss": NODES | ACTIVE,
    "joint_transducer_loss, HAT": NODES | ACTIVE,
    "joint_transducer_loss, SpeechBrain's layers": NODES,
    "sequence_log_prob": NODES,
    "TransducerGreedySearch": LENGTHS | GREEDY,
    "TransducerBeamSearch": LENGTHS | BEAM,
    "TransducerSampler": dict.fromkeys(LENGTHS, 2) | SAMPLE,
    "MinWERLoss": {
        **(NODES | ACTIVE | TWICE | LENGTHS | BEAM | MIN_WER),
        "transducer.training.expected_errors.expected_errors": 1,
    },
    "MinWERLoss, sampled": {
        **(NODES | ACTIVE | TWICE | SAMPLE | MIN_WER),
        **dict.fromkeys(LENGTHS, 2),
    },
    "ChunkedEncoder, a stream": {
        "transducer.streaming.chunked_encoder.forward_streaming": 1
    },
    "LocalFbank, TimeReduction": {"speechbrain.processing.features.forward": 2},
    "StreamingTransducer": {
        **(LENGTHS | GREEDY),
        "transducer.streaming.streaming_transducer._process": EACH,
        "transducer.streaming.streaming_transducer._features": EACH,
        "transducer.streaming.streaming_transducer.encode": EACH,
        "transducer.streaming.frontend.push": EACH,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_devices_and_waits(name):
    check(run(CASES[name]), WAITS[name])


def test_everything_public_is_here():
    public = public_names("transducer")
    assert public == {n for n in public if n in globals()} | set(REASONS)
    assert not set(REASONS) & set(globals())
