"""Layers whose hooks do not fire, are left out, or get nested tensors."""

import asyncio
import contextlib
import contextvars
import copy
import threading

import pytest
import torch
from adapters_toy import ToyEncoder, scramble

from speechbrain_taskarith.adapters import AudioAdapterFusion, insert_adapters
from speechbrain_taskarith.adapters.combination.base import Combination

NAMES = ["us", "german"]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        return self.step(x)

    def step(self, x):
        return x + self.norm(x)


class StepEncoder(torch.nn.Module):
    """Calls a method of its layers, where no forward hook fires."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x, as_a_whole=False):
        for layer in self.layers:
            x = layer(x) if as_a_whole else layer.step(x)
        return x

    def infer(self, x):
        return self.forward(x)


@pytest.mark.parametrize("number", [1, 2])
def test_a_hook_that_does_not_fire_is_an_error(number):
    encoder = StepEncoder(number)
    x = torch.randn(2, 5, 8)
    handle = insert_adapters(encoder, NAMES, bottleneck=4, combination="mean")
    base = encoder(x)
    for choice in ("us", "combined", ["us", "german"]):
        handle.use(choice)
        with pytest.raises(ValueError, match="'layers.0' was computed without"):
            encoder(x)
        encoder(x, as_a_whole=True)
    if number > 1:  # not the encoder's forward either
        with pytest.raises(ValueError, match="'layers.0' was computed without"):
            encoder.infer(x)
    handle.use(None)
    assert torch.equal(encoder(x), base)
    handle.remove()
    assert not any(m._forward_pre_hooks for m in encoder.modules())


def test_torchaudios_streaming_is_refused():
    torchaudio = pytest.importorskip("torchaudio")
    encoder = torchaudio.models.Emformer(8, 2, 16, 2, 4, right_context_length=2)
    encoder.eval()
    handle = insert_adapters(encoder, NAMES, bottleneck=4)
    scramble(handle)
    x, lens = torch.randn(1, 6, 8), torch.tensor([6])
    base = encoder.infer(x, lens)[0]
    handle.use("us")
    with pytest.raises(ValueError, match="infer"):
        encoder.infer(x, lens)
    assert not torch.allclose(encoder(x, lens)[0], base, atol=1e-2)


def test_replicas_of_data_parallel_are_refused():
    encoder = ToyEncoder()
    handle = insert_adapters(encoder, NAMES, bottleneck=4)
    replica = encoder.layers[0]._replicate_for_data_parallel()
    x = torch.randn(2, 5, 8)
    replica(x)
    handle.use("us")
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        replica(x)


@pytest.mark.parametrize("choice", ["us", "combined", ["german", None, "us"]])
def test_padded_batches_of_torchs_encoder(choice):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2).eval()
    handle = insert_adapters(encoder, NAMES, bottleneck=4, combination="fusion")
    scramble(handle)
    frames = [5, 2, 4]
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor(frames)[:, None]
    with torch.no_grad():
        handle.use(choice)
        batch = encoder(x, src_key_padding_mask=padding)
        for i, number in enumerate(frames):
            handle.use(choice[i] if isinstance(choice, list) else choice)
            alone = encoder(x[i : i + 1, :number])
            torch.testing.assert_close(batch[i, :number], alone[0])


class DropEncoder(ToyEncoder):
    """Leaves out the layers that it is told to."""

    drop = ()

    def forward(self, x):
        x = self.front(x)
        for i, layer in enumerate(self.layers):
            if i not in self.drop:
                x, _ = layer(x)
        return x


def test_attention_of_layers_that_were_left_out():
    encoder = DropEncoder().eval()
    handle = insert_adapters(
        encoder, NAMES, combination=AudioAdapterFusion(guided=True)
    )
    scramble(handle)
    x = torch.randn(2, 5, 4)
    handle.use("combined")
    encoder(x)
    full = handle.attention()
    assert torch.isfinite(full).all()
    encoder.drop = (1,)
    encoder(x)
    seen = handle.attention()
    assert torch.isnan(seen[1]).all()
    torch.testing.assert_close(seen[0], full[0])
    own = [c.combination.live_weights for c in handle.layers]
    wanted = -torch.stack([own[0][..., 0].log(), own[2][..., 0].log()]).mean()
    torch.testing.assert_close(handle.attention_loss(["us", "us"]), wanted)
    encoder.drop = (0, 1, 2)
    encoder(x)
    with pytest.raises(ValueError, match="no batch yet"):
        handle.attention()


@contextlib.contextmanager
def one_process(path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/meet", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["us", "MT-A"])
def test_ddp_trains_where_layers_are_left_out(mode, tmp_path):
    encoder = DropEncoder()
    handle = insert_adapters(
        encoder, NAMES, bottleneck=4, combination="fusion", train=mode
    )
    scramble(handle)
    encoder.train()
    with one_process(tmp_path):
        run = torch.nn.parallel.DistributedDataParallel(encoder)
        for encoder.drop in ((), (0,), (1, 2), (2,), (0, 2), ()):
            encoder.zero_grad()
            run(torch.randn(2, 5, 4)).square().sum().backward()
            for i, layer in enumerate(handle.layers):
                trained = [p for p in layer.parameters() if p.requires_grad]
                assert trained and all(p.grad is not None for p in trained)
                moved = any(p.grad.abs().sum() > 0 for p in trained)
                assert moved == (i not in encoder.drop)


def test_threads_have_choices_of_their_own():
    torch.manual_seed(0)
    encoder = ToyEncoder().eval()
    handle = insert_adapters(encoder, ["a", "b", "c"], bottleneck=4)
    scramble(handle)
    x = torch.randn(1, 5, 4)
    choices = ["a", "b", "c", None, ["b"]]
    with torch.no_grad():
        wanted = []
        for choice in choices:
            with handle.use(choice):
                wanted.append(encoder(x))
    wrong, start = [], threading.Barrier(len(choices))

    @torch.no_grad()
    def work(choice, expected):
        start.wait()
        for _ in range(60):
            with handle.use(choice):
                first = encoder(x)
                with handle.use("a"):
                    other = encoder(x)
                last = encoder(x)
            for found, right in ((first, expected), (last, expected)):
                wrong.append(not torch.equal(found, right))
            wrong.append(not torch.equal(other, wanted[0]))

    threads = [
        threading.Thread(target=work, args=pair)
        for pair in zip(choices, wanted)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(wrong) == 60 * 3 * len(choices) and not any(wrong)
    assert handle.in_use is None


def test_a_choice_without_with_holds_in_new_threads():
    handle = insert_adapters(ToyEncoder(), ["a", "b"], bottleneck=4)
    handle.use("b")
    seen = []
    with handle.use("a"):
        thread = threading.Thread(target=lambda: seen.append(handle.in_use))
        thread.start(), thread.join()
        handle.use(None)  # holds until the end of the block
        assert handle.in_use is None
        assert copy.deepcopy(handle).in_use is None
    assert seen == ["b"] and handle.in_use == "b"


def test_uses_that_meet_restore_what_was_there():
    handle = insert_adapters(ToyEncoder(), ["a", "b"], bottleneck=4)
    handle.use("b")
    for order in ((0, 1), (1, 0)):
        # As two threads that are between `use` and `with`.
        both = handle.use("a"), handle.use(None)
        for i in order:
            both[i].__enter__()
        assert handle.in_use == ("a", None)[order[1]]
        for i in reversed(order):
            both[i].__exit__()
        assert handle.in_use == "b"


def test_asyncio_tasks_have_choices_of_their_own():
    handle = insert_adapters(ToyEncoder(), ["a", "b"], bottleneck=4)

    async def work(choice):
        with handle.use(choice):
            await asyncio.sleep(0.01)
            return handle.in_use

    async def all_of_them():
        return await asyncio.gather(*map(work, ["a", "b", None]))

    assert asyncio.run(all_of_them()) == ["a", "b", None]
    assert handle.in_use is None


def test_autograds_own_threads_see_the_choice():
    handle = insert_adapters(ToyEncoder(), ["a", "b"], bottleneck=4)
    seen = []

    def look(gradient):
        thread = threading.Thread(target=lambda: seen.append(handle.in_use))
        thread.start(), thread.join()
        seen.append(handle.in_use)
        # As in a thread without the context, within a backward pass.
        seen.append(contextvars.Context().run(lambda: handle.in_use))

    x = torch.zeros(1, requires_grad=True)
    y = x * 1
    y.register_hook(look)
    with handle.use("a"):
        y.backward()
    assert seen == [None, "a", "a"]


class Product(Combination):
    """A combination with the least that one needs."""

    def _as_loop(self, x):
        return sum(self.bank[name](x) for name in self.names)


def test_a_combination_needs_the_loop_alone():
    encoder = ToyEncoder().eval()
    handle = insert_adapters(encoder, NAMES, bottleneck=4, combination=Product)
    scramble(handle)
    x = torch.randn(2, 5, 4)
    handle.use("combined")
    wanted = encoder(x)
    handle.fold()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), wanted)
    assert handle.train_composition("MT-A")
    torch.testing.assert_close(encoder(x), wanted)


@pytest.mark.parametrize("names", [["us"], ["us", "german", "v1.5 %2E"]])
def test_a_checkpoint_of_other_adapters_says_which(names):
    other = ToyEncoder()
    insert_adapters(other, names, bottleneck=4)
    encoder = ToyEncoder()
    insert_adapters(encoder, NAMES, bottleneck=4)
    shown = ", ".join(sorted(names)).replace(".", r"\.")
    with pytest.raises(
        RuntimeError, match=f"has the adapters {shown}, the encoder german, us"
    ):
        encoder.load_state_dict(other.state_dict())


class Gains(Product):
    """Its parameters have an order, of which it says nothing."""

    def __init__(self, bank, **others):
        super().__init__(bank, **others)
        self.gains = torch.nn.Parameter(torch.ones(len(self.names)))


@pytest.mark.parametrize("kind", ["weighted_mean", "fusion", Gains])
def test_a_checkpoint_of_another_combination(kind):
    def made(names):
        handle = insert_adapters(ToyEncoder(), [*NAMES, "x"], bottleneck=4)
        handle.set_combination(kind, names=names)
        return handle

    state = made(NAMES).state_dict()
    with pytest.raises(RuntimeError, match="combines us, german, this one us"):
        made(["us", "x"]).load_state_dict(state)
    if kind is Gains:
        with pytest.raises(RuntimeError, match="this one german, us"):
            made(NAMES[::-1]).load_state_dict(state)
    # Earlier versions did not write the names.
    old = {k: v for k, v in state.items() if "combined_names" not in k}
    assert len(old) == len(state) - 3
    made(NAMES).load_state_dict(old)


@pytest.mark.parametrize("frames", [3, 6])
def test_frames_first_is_refused_where_utterances_count(frames):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)  # [T, B, d]
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    fusion = AudioAdapterFusion(running=True)
    handle = insert_adapters(encoder, NAMES, combination=fusion)
    x = torch.randn(frames, 3, 8)
    for choice in (["us", "german", None], "combined"):
        handle.use(choice)
        with pytest.raises(ValueError, match="frames first"):
            encoder(x)
    handle.use("us")
    encoder(x)


def self_supervised(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    front = {
        "conv_dim": (8, 8),
        "conv_stride": (4, 4),
        "conv_kernel": (8, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 2,
        "num_conv_pos_embedding_groups": 2,
    }
    if kind == "Wav2Vec2":
        front |= {"add_adapter": True, "num_adapter_layers": 2}
    if kind == "Data2VecAudio":
        front |= {"conv_pos_kernel_size": 3}
    if kind == "Wav2Vec2Bert":
        front = {"add_adapter": True, "num_adapter_layers": 1}
    if kind == "ParakeetEncoder":
        sizes |= {"subsampling_conv_channels": 4, "num_mel_bins": 16}
        front = {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **front)
    suffix = "" if kind == "ParakeetEncoder" else "Model"
    return getattr(transformers, kind + suffix)(config)


@pytest.mark.parametrize(
    "kind", ["Wav2Vec2", "Data2VecAudio", "Wav2Vec2Bert", "ParakeetEncoder"]
)
def test_the_default_takes_encoder_layers_alone(kind):
    handle = insert_adapters(self_supervised(kind), NAMES, bottleneck=2)
    start = "" if kind == "ParakeetEncoder" else "encoder."
    assert handle.layer_names == [f"{start}layers.{i}" for i in range(2)]


def test_adapters_inside_are_no_layers():
    inner = ToyEncoder()
    insert_adapters(inner, ["a"], bottleneck=2)
    outer = torch.nn.ModuleDict({"e": inner})
    handle = insert_adapters(outer, ["b"], bottleneck=2)
    assert handle.layer_names == [f"e.layers.{i}" for i in range(3)]
