"""Streams: any portions of samples give what the whole recording gives."""

import copy
import io
import time

import pytest
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization

from speechbrain_taskarith.transducer import (
    ChunkedEncoder,
    Emformer,
    LocalFbank,
    LSTMPredictor,
    RNNTJoint,
    StreamingTransducer,
    TimeReduction,
    TransducerBeamSearch,
    TransducerGreedySearch,
)
from speechbrain_taskarith.transducer.streaming.frontend import (
    FeatureStream,
)


def conformer(width):
    from speechbrain.lobes.models.transformer.TransformerASR import (
        TransformerASR,
    )

    transformer = TransformerASR(
        tgt_vocab=5,
        input_size=width,
        d_model=16,
        nhead=2,
        num_encoder_layers=2,
        num_decoder_layers=0,
        d_ffn=16,
        attention_type="RelPosMHAXL",
        positional_encoding=None,
        encoder_module="conformer",
        normalize_before=True,
        causal=False,
    )
    return ChunkedEncoder(transformer, chunk_size=4, left_context=2)


def model(beam=True, encoder=None, normalize=None):
    torch.manual_seed(2)
    predictor = LSTMPredictor(9, 4, 5, num_layers=1)
    joint = RNNTJoint(16, 5, 8, 9)
    joint.output.weight.data *= 20  # labels come out
    joint.predictor_layer.weight.data *= 3
    search = (
        TransducerBeamSearch(predictor, joint, 0, 3)
        if beam
        else TransducerGreedySearch(predictor, joint, 0, 2)
    )
    return StreamingTransducer(
        LocalFbank(n_mels=20, n_fft=400),
        encoder or Emformer(16, 4, 32, 2, 4, 1, 8, 2),
        search,
        lambda tokens: " ".join(map(str, tokens)),
        normalize=normalize,
        frontend=TimeReduction(20, 16, factor=4),
    ).eval()


def wave(samples, seed=0):
    made = torch.Generator().manual_seed(seed)
    envelope = torch.rand(samples // 800 + 1, generator=made)
    noise = torch.randn(samples, generator=made)
    return noise * envelope.repeat_interleave(800)[:samples]


PORTIONS = [1600, 333, 7, 10**6]


@pytest.mark.parametrize("beam", [True, False])
@pytest.mark.parametrize("portion", PORTIONS)
def test_stream_equals_whole(beam, portion):
    recogniser = model(beam)
    for samples in (12345, 160, 1, 640, 9600):
        stream, given = recogniser.stream(), wave(samples)
        for part in given.split(portion if samples < 13000 else 1600):
            partial = stream.feed(part, sample_rate=16000)
            assert not partial.final
        final = stream.finish()
        assert final.final
        assert final.text == recogniser.transcribe(given)
        assert final.seconds == samples / 16000
    assert len(model(beam).transcribe(wave(12345)).split()) > 2


@pytest.mark.parametrize("frames", [4, 16, 14])
def test_speechbrain_conformer_streams_too(frames):
    torch.manual_seed(0)
    encoder = conformer(16).eval()
    x, context = torch.randn(1, frames, 16), encoder.make_streaming_context()
    parts = [encoder.forward_streaming(c, context) for c in x.split(4, dim=1)]
    whole = encoder(x, torch.ones(1))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    recogniser = model(beam=False, encoder=encoder)
    given, stream = wave(640 * frames), recogniser.stream()
    for part in given.split(500):
        stream.feed(part)
    assert stream.finish().text == recogniser.transcribe(given)


@pytest.mark.parametrize("samples", [1, 159, 160, 200, 201, 1600, 4321])
@pytest.mark.parametrize("portion", [1, 100, 160, 777])
def test_features_of_a_stream_are_those_of_the_whole(samples, portion):
    fbank, given = LocalFbank(n_mels=20), wave(samples)
    stream = FeatureStream(fbank, window=400, stride=160)
    parts = [stream.push(part) for part in given.split(portion)]
    parts.append(stream.finish())
    parts = torch.cat([part for part in parts if part is not None], 1)
    whole = fbank(given[None])
    assert parts.shape == whole.shape
    assert torch.allclose(parts, whole, atol=2e-3)


@pytest.mark.parametrize("rate, win, hop", [(22050, 20, 10), (11000, 15, 7.5)])
def test_of_an_odd_window_as_well(rate, win, hop):
    sizes = {"sample_rate": rate, "win_length": win, "hop_length": hop}
    fbank = LocalFbank(n_mels=20, n_fft=512, **sizes)
    window, stride = round(rate * win / 1000), int(rate * hop / 1000)
    assert window % 2 == 1 and window // 2 % stride == 0
    given = wave(rate)
    stream = FeatureStream(fbank, window=window, stride=stride)
    parts = [stream.push(part) for part in given.split(777)]
    parts = [part for part in (*parts, stream.finish()) if part is not None]
    torch.testing.assert_close(
        torch.cat(parts, 1), fbank(given[None]), atol=2e-3, rtol=0
    )


def test_frames_come_as_soon_as_they_are_certain():
    stream = FeatureStream(LocalFbank(n_mels=20), window=400, stride=160)
    # Frame 0 needs samples up to 199, frame 1 up to 359.
    assert stream.push(torch.rand(199)) is None
    assert stream.push(torch.rand(1)).shape[1] == 1
    assert stream.push(torch.rand(159)) is None
    assert stream.push(torch.rand(1)).shape[1] == 1


def test_text_comes_before_the_end():
    recogniser, stream = model(False), None
    stream = recogniser.stream()
    seen = [stream.feed(part).tokens for part in wave(16000).split(1600)]
    for before, after in zip(seen, seen[1:]):
        # Greedy never takes anything back.
        assert after[: len(before)] == before
    assert seen[4] and len(seen[4]) < len(seen[-1])


def test_streams_do_not_disturb_one_another():
    recogniser = model()
    one, other = recogniser.stream(), recogniser.stream()
    a, b = wave(8000, 1), wave(8000, 2)
    for x, y in zip(a.split(900), b.split(900)):
        one.feed(x)
        other.feed(y)
    assert one.finish().text == recogniser.transcribe(a)
    assert other.finish().text == recogniser.transcribe(b)


def test_batch_of_ragged_recordings_equals_singles():
    recogniser = model()
    lengths = [9600, 4000, 7777]
    # In the padding: nothing, noise or NaN.
    waves = torch.stack([torch.zeros(9600), wave(9600, 7), torch.zeros(9600)])
    waves[2] = float("nan")
    for row, count in enumerate(lengths):
        waves[row, :count] = wave(count, row)
    out, lens = recogniser.encode(waves, torch.tensor(lengths) / 9600)
    for row, count in enumerate(lengths):
        alone, _ = recogniser.encode(waves[row : row + 1, :count])
        frames = round(float(lens[row]) * out.shape[1])
        assert alone.shape[1] == frames
        assert torch.allclose(alone[0], out[row, :frames], atol=1e-4)


def test_global_normalisation_is_applied():
    normalize = InputNormalization(norm_type="global", update_until_epoch=1)
    normalize(torch.randn(4, 50, 20) * 3 + 5, torch.ones(4), epoch=0)
    recogniser = model(normalize=normalize)
    given, stream = wave(8000), recogniser.stream()
    for part in given.split(1000):
        stream.feed(part)
    assert stream.finish().text == recogniser.transcribe(given)
    mean = normalize.glob_mean.clone()
    recogniser.transcribe(given)
    assert torch.equal(mean, normalize.glob_mean)
    with pytest.raises(ValueError, match="'sentence'"):
        model(normalize=InputNormalization(norm_type="sentence"))


def normalised():
    normalize = InputNormalization(norm_type="global", update_until_epoch=1)
    normalize(torch.randn(4, 50, 20) * 3 + 5, torch.ones(4), epoch=0)
    return model(normalize=normalize), normalize


def test_the_normaliser_is_saved_as_tensors(tmp_path):
    from safetensors.torch import load_file, save_file

    recogniser, normalize = normalised()
    state = recogniser.state_dict()
    save_file(state, str(tmp_path / "model.safetensors"))
    fresh = model(normalize=InputNormalization(norm_type="global"))
    fresh.load_state_dict(load_file(str(tmp_path / "model.safetensors")))
    for name in ("count", "glob_mean", "glob_std"):
        expected = torch.as_tensor(getattr(normalize, name))
        found = getattr(fresh.normalize, name)
        assert torch.equal(torch.as_tensor(found), expected)
    assert isinstance(fresh.normalize.count, int)
    given = wave(8000)
    assert fresh.transcribe(given) == recogniser.transcribe(given)
    # Under a parent, and as a copy.
    parent = torch.nn.ModuleDict({"asr": model(normalize=fresh.normalize)})
    parent.load_state_dict({f"asr.{k}": v for k, v in state.items()})
    with pytest.raises(RuntimeError, match="with a normaliser"):
        model().load_state_dict(state)
    with pytest.raises(RuntimeError, match="normalize.glob_mean"):
        fresh.load_state_dict(model().state_dict())
    # Like all weights, to where the model is.
    elsewhere = fresh.to("meta")
    elsewhere.load_state_dict(state)
    assert elsewhere.normalize.glob_mean.is_meta


def test_weights_of_earlier_versions_still_load():
    recogniser, normalize = normalised()
    state = recogniser.state_dict()
    names = ("count", "glob_mean", "glob_std")
    for name in names:
        del state[f"normalize.{name}"]
    state["_extra_state"] = {n: getattr(normalize, n) for n in names}
    for name in [*recogniser.searcher.joint.state_dict()]:
        twice = f"searcher.label_scores.joint.{name}"
        state[twice] = state[f"searcher.joint.{name}"]
    fresh = model(normalize=InputNormalization(norm_type="global"))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.normalize.glob_std, normalize.glob_std)
    plain = model()
    plain.load_state_dict({**plain.state_dict(), "_extra_state": {}})


def test_a_task_vector_leaves_the_normaliser_alone():
    from speechbrain_taskarith.vectors import TaskVector

    base, tuned = (normalised()[0].state_dict() for _ in range(2))
    tuned = {n: t + 1 if t.is_floating_point() else t for n, t in tuned.items()}
    vector = TaskVector.between(base, tuned)
    assert len(vector) == len(base) - 3
    edited = vector.apply(base)
    for name in ("count", "glob_mean", "glob_std"):
        key = f"normalize.{name}"
        assert torch.equal(edited[key], base[key])


def test_sixteen_bit_samples_are_scaled():
    recogniser = model()
    given = (wave(8000).clamp(-3, 3) * 8000).to(torch.int16)
    expected = recogniser.transcribe(given.float() / 32768)
    assert recogniser.transcribe(given) == expected != ""
    stream = recogniser.stream()
    for part in given.numpy().reshape(-1, 500):
        stream.feed(part)
    assert stream.finish().text == expected


def test_computing_time_includes_results_and_text():
    recogniser, calls = model(), []

    def slow(tokens):
        calls.append(tokens)
        time.sleep(0.02)
        return "text"

    recogniser.detokenize = slow
    stream = recogniser.stream()
    for part in wave(8000).split(100):
        seen = stream.feed(part)
    # Once at the beginning and once a segment of 160 ms, not once a feed.
    assert 2 <= len(calls) <= 4
    assert seen.compute_seconds > 0.02 * len(calls)


def test_silence_nothing_and_latency():
    recogniser = model()
    empty = recogniser.stream().finish()
    assert empty.text == "" and empty.real_time_factor == 0.0
    assert recogniser.transcribe(torch.zeros(0)) == ""
    latency = recogniser.latency()
    # Segment 4, look-ahead 1, of 40 ms; half a window of 25 ms.
    assert latency["segment"] == pytest.approx(0.160)
    assert latency["look_ahead"] == pytest.approx(0.040)
    assert latency["algorithmic"] == pytest.approx(0.2125)


def test_bad_input():
    stream = model().stream()
    bad = [
        ({"samples": torch.zeros(8), "sample_rate": 8000}, "16000 Hz"),
        ({"samples": torch.zeros(2, 8)}, "one channel"),
        ({"samples": torch.zeros(8, dtype=torch.int32)}, "int16"),
        ({"samples": torch.full((8,), torch.nan)}, "NaN"),
    ]
    for given, message in bad:
        with pytest.raises(ValueError, match=message):
            stream.feed(**given)
    stream.finish()
    with pytest.raises(RuntimeError, match="has ended"):
        stream.feed(torch.zeros(8))


@pytest.mark.parametrize("use", ["stream", "encode", "transcribe"])
def test_training_mode_is_refused_before_statistics_move(use):
    training, normalize = normalised()
    training.train()
    before = normalize.glob_mean.clone()
    given = {"stream": (), "encode": (wave(8000)[None],)}
    with pytest.raises(RuntimeError, match="training mode"):
        getattr(training, use)(*given.get(use, (wave(8000),)))
    assert torch.equal(normalize.glob_mean, before)


@pytest.mark.parametrize("option", ["deltas", "context"])
def test_features_that_look_at_their_neighbours_are_refused(option):
    whole = model()
    with pytest.raises(ValueError, match=f"{option}=True"):
        StreamingTransducer(
            LocalFbank(n_mels=20, **{option: True}),
            whole.encoder,
            whole.searcher,
            str,
        )


def test_features_with_a_floor_below_the_loudest_frame_are_told():
    whole = model()
    with pytest.warns(UserWarning, match="80.0 dB.*LocalFbank"):
        StreamingTransducer(Fbank(), whole.encoder, whole.searcher, str)


def stored(recogniser):
    """Bytes of the weights, packed ones too."""
    stream = io.BytesIO()
    torch.save(recogniser.state_dict(), stream)
    return stream.tell()


def wide():
    """A recogniser whose size is that of its matrices."""
    torch.manual_seed(0)
    predictor = LSTMPredictor(40, 32, 64, num_layers=1)
    search = TransducerGreedySearch(
        predictor, RNNTJoint(64, 64, 64, 40), 0, max_symbols=1
    )
    return StreamingTransducer(
        LocalFbank(n_mels=40),
        Emformer(64, 4, 256, 4, 4, 1, 8, memory_size=2),
        search,
        lambda tokens: " ".join(map(str, tokens)),
        frontend=TimeReduction(40, 64),
    ).eval()


@pytest.mark.parametrize(
    "dtype, share, worst", [("int8", 0.35, 0.05), ("bf16", 0.55, 0.02)]
)
def test_a_quantised_copy_is_small_and_computes_nearly_the_same(
    dtype, share, worst
):
    whole, given = wide(), wave(16000)
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    small = whole.quantize(dtype)
    assert stored(small) < share * stored(whole)
    expected, _ = whole.encode(given[None])
    found, _ = small.encode(given[None])
    error = (found.float() - expected).norm() / expected.norm()
    assert 1e-6 < error < worst
    stream, pieces = small.stream(), []
    advance = small.searcher.advance
    small.searcher.advance = lambda out, state: (
        pieces.append(out) or advance(out, state)
    )
    for samples in given.split(1600):
        stream.feed(samples)
    stream.finish()
    streamed = torch.cat(pieces, 1).float()
    assert (streamed - expected).norm() / expected.norm() < 2 * worst
    # The model itself is as it was.
    for name, value in whole.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_other_types_of_the_whole_model_keep_float32_features():
    whole, given = wide(), wave(8000)
    exact = copy.deepcopy(whole).double()
    out, _ = exact.encode(given[None])
    assert out.dtype == torch.float64
    torch.testing.assert_close(
        out.float(), whole.encode(given[None])[0], rtol=1e-4, atol=1e-5
    )
    stream = exact.stream()
    stream.feed(given)
    assert stream.finish().text == exact.transcribe(given)


def test_a_conformer_in_bfloat16_hears_nearly_the_same():
    whole, given = model(encoder=conformer(16)), wave(8000)
    small = whole.quantize("bf16")
    expected, found = whole.encode(given[None])[0], small.encode(given[None])[0]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    stream = small.stream()
    for samples in given.split(1600):
        stream.feed(samples)
    assert stream.finish().text and small.transcribe(given)


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(ValueError, match="'int4': expected 'int8' or 'bf16'"):
        wide().quantize("int4")
    with pytest.raises(ValueError, match="int8 is for float32 on the CPU"):
        wide().bfloat16().quantize("int8")
