"""`insert_adapters(load=...)`: files are read before there is a base."""

import json
import logging

import pytest
import safetensors
import torch
from adapters_toy import ToyEncoder, scramble
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer, average_checkpoints
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_taskarith.adapters import AudioAdapterFusion, insert_adapters

NAMES = ["us", "german"]


class Parts:
    """A recipe's modules, its adapters and its recoverables."""

    def __init__(self, seed, names=NAMES, freeze="named", **arguments):
        torch.manual_seed(seed)
        self.cnn, self.encoder = torch.nn.Linear(4, 4), ToyEncoder()
        self.head = torch.nn.Linear(8, 3)
        self.normalize = InputNormalization()
        self.normalize(torch.randn(2, 30, 4) + seed, torch.ones(2))
        self.modules = {
            "CNN": self.cnn,
            "Transformer": self.encoder,
            "ctc_lin": self.head,
            "normalize": self.normalize,
        }
        self.model = torch.nn.ModuleList([self.cnn, self.encoder, self.head])
        freeze = {
            "named": self.modules,
            "listed": [self.head, self.cnn, self.normalize],
            "nothing": None,
        }[freeze]
        self.handle = insert_adapters(
            self.encoder,
            names,
            **{"bottleneck": 4, "combination": "fusion", **arguments},
            freeze=freeze,
        )
        for module in self.modules.values():
            module.eval()

    def checkpointer(self, folder, **others):
        return Checkpointer(
            folder,
            {"model": self.model, "normalizer": self.normalize, **others},
        )

    def start_from(self, base, folder):
        """Load another's weights as a recipe's pretrainer does."""
        saved = base.checkpointer(folder).save_checkpoint(name="base").path
        pretrainer = Pretrainer(
            collect_in=folder / "collected",
            loadables={"model": self.model, "normalizer": self.normalize},
            paths={
                "model": f"{saved}/model.ckpt",
                "normalizer": f"{saved}/normalizer.ckpt",
            },
        )
        pretrainer.collect_files()
        pretrainer.load_collected()

    def __call__(self, choice):
        self.handle.use(choice)
        x = torch.randn(2, 5, 4, generator=torch.manual_seed(7))
        with torch.no_grad():
            x = self.normalize(x, torch.ones(2))
            return self.head(self.encoder(self.cnn(x)))


def base():
    """The base as it was trained: no adapters yet."""
    plain = Parts(0)
    plain.handle.remove()
    return plain


@pytest.fixture
def trained(tmp_path):
    """Adapters of two tasks, and their files in a folder."""
    parts = Parts(0)
    scramble(parts.handle, seed=5)
    folder = tmp_path / "files"
    for name in NAMES:
        parts.handle.save_adapter(name, folder / f"{name}.safetensors")
    parts.handle.save_combination(folder / "fusion.safetensors")
    parts.files = folder
    return parts


def by_name(trained):
    return {name: trained.files / f"{name}.safetensors" for name in NAMES}


@pytest.mark.parametrize("form", ["dict", "folder", "file"])
@pytest.mark.parametrize("freeze", ["named", "listed", "nothing"])
def test_files_first_and_then_the_base(trained, tmp_path, form, freeze):
    load = {
        "dict": {"combined": trained.files / "fusion.safetensors"}
        | by_name(trained),
        "folder": str(trained.files),
        "file": trained.files / "us.safetensors",
    }[form]
    parts = Parts(9, freeze=freeze, load=load)  # built with other weights
    parts.start_from(base(), tmp_path / "base")
    choices = ["us"] if form == "file" else [*NAMES, "combined"]
    for choice in choices:
        torch.testing.assert_close(
            parts(choice), trained(choice), atol=0, rtol=0
        )


@pytest.mark.parametrize("choice", [None, "us"])
def test_another_base_is_refused_at_every_forward_pass(trained, choice):
    parts = Parts(9, load=by_name(trained))
    ours, theirs = (
        one.handle.base_fingerprint()[:12] for one in (parts, trained)
    )
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            parts(choice)
        for part in ("'us'", "us.safetensors", ours, theirs, "any_base=True"):
            assert part in str(error.value)
    parts = Parts(9, load=by_name(trained), any_base=True)
    parts(choice)


@pytest.mark.parametrize("freeze", ["named", "listed"])
@pytest.mark.parametrize("part", ["CNN", "ctc_lin", "normalize"])
def test_another_frozen_module_is_refused(trained, tmp_path, freeze, part):
    parts = Parts(9, freeze=freeze, load=by_name(trained))
    parts.start_from(base(), tmp_path / "base")
    module = parts.modules[part]
    if part == "normalize":
        module.glob_mean = module.glob_mean + 0.01
    else:
        module.weight[0, 0].data += 0.01
    name = part if freeze == "named" else type(module).__name__
    with pytest.raises(ValueError, match=f"trained beside another {part}"):
        parts("us")
    # Loaded by hand, it is refused as well, and nothing changes.
    parts = Parts(0, freeze=freeze)
    parts.modules[part].load_state_dict(module.state_dict())
    if part == "normalize":
        parts.normalize.glob_mean = module.glob_mean
    before = parts("us")
    with pytest.raises(ValueError, match=f"{part}.* {name} here has"):
        parts.handle.load_adapter(trained.files / "us.safetensors")
    assert torch.equal(parts("us"), before)


def test_a_module_that_is_not_frozen_here_cannot_be_checked(trained, caplog):
    parts = Parts(0, freeze="nothing", load=by_name(trained))
    parts("us")
    for name in ("CNN", "ctc_lin", "normalize"):
        assert f"beside a frozen {name}" in caplog.text


def test_files_from_before_frozen_modules_were_named(trained):
    bare = Parts(0, freeze="nothing")
    scramble(bare.handle, seed=5)
    path = trained.files / "old.safetensors"
    bare.handle.save_adapter("us", path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["speechbrain_taskarith"])
    assert about["version"] == 1 and "frozen" not in about
    parts = Parts(0, load={"us": path})
    assert torch.equal(parts("us"), bare("us"))


def test_the_frozen_may_hold_the_encoder(trained, tmp_path):
    """The adapters in it change, its fingerprint does not."""
    for seed in (0, 9):
        parts = Parts(seed, freeze="nothing")
        outer = torch.nn.Sequential(parts.cnn, parts.encoder, parts.head)
        parts.handle.freeze(outer)
        scramble(parts.handle, seed=seed)
        if seed == 0:
            path = tmp_path / "a.safetensors"
            parts.handle.save_adapter("us", path)
            (entry,) = parts.handle.frozen_fingerprints()
            assert entry["class"] == "Sequential"
            scramble(parts.handle, seed=1)
            parts.handle.load_adapter(path)
        else:
            with pytest.raises(ValueError, match="another base"):
                parts.handle.load_adapter(path)


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("any_base", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_recovered_checkpoint_wins(
    trained, tmp_path, caplog, moved, any_base
):
    caplog.set_level(logging.INFO)
    first = Parts(9, load=by_name(trained), train="MT-A")
    first.start_from(base(), tmp_path / "base")
    before = first("us")
    if moved:
        scramble(first.handle, seed=8)
    expected = first("us")
    first.checkpointer(tmp_path / "save").save_checkpoint()
    caplog.clear()
    again = Parts(9, load=by_name(trained), train="MT-A", any_base=any_base)
    again.checkpointer(tmp_path / "save").recover_if_possible()
    assert torch.equal(again("us"), expected)
    assert torch.equal(expected, before) != moved
    (record,) = (r for r in caplog.records if "those of load" in r.getMessage())
    assert "us, german" in record.getMessage()
    assert (record.levelno == logging.WARNING) == moved


def test_a_pretrainers_file_with_other_adapters_is_told(
    trained, tmp_path, caplog
):
    """Chain and load at once: what the file has is not lost in silence."""
    parts = Parts(9, load={"german": trained.files / "german.safetensors"})
    other = Parts(0, names=["us"], combination=None)
    scramble(other.handle, seed=2)
    parts.start_from(other, tmp_path / "run")
    assert torch.equal(parts("us"), other("us"))
    assert torch.equal(parts("german"), trained("german"))
    parts = Parts(9, load={"us": trained.files / "us.safetensors"})
    parts.start_from(other, tmp_path / "again")
    assert torch.equal(parts("us"), other("us"))
    assert "replace those of load: us (with other values)" in caplog.text


# --------------------------------------------- from SpeechBrain's checkpoints


@pytest.fixture
def runs(tmp_path):
    """Two runs from one base, each with an adapter of its own."""
    folders = {}
    for i, name in enumerate(NAMES):
        parts = Parts(0)
        for layer in parts.handle.layers:
            scramble(layer.bank[name], seed=i + 1)
        folder = tmp_path / name
        # Text, which no reader of weights can read, beside the model.
        (folder / "x").mkdir(parents=True)
        parts.checkpointer(folder).save_checkpoint()
        scramble(parts.handle, seed=7)
        saved = parts.checkpointer(folder).save_checkpoint().path
        (saved / "counter.ckpt").write_text("2")
        folders[name] = saved, parts
    return folders


@pytest.mark.parametrize("form", ["save", "CKPT", "file"])
@pytest.mark.parametrize("freeze", ["named", "listed", "nothing"])
def test_two_runs_are_combined_by_their_checkpoints(
    runs, tmp_path, form, freeze
):
    load = {
        name: {
            "save": str(saved.parent),
            "CKPT": saved,
            "file": saved / "model.ckpt",
        }[form]
        for name, (saved, _) in runs.items()
    }
    parts = Parts(9, freeze=freeze, load=load, train="ST-A")
    parts.start_from(base(), tmp_path / "base")
    for name, (_, run) in runs.items():
        assert torch.equal(parts(name), run(name))


@pytest.mark.parametrize("part", ["Transformer", "CNN", "ctc_lin", "normalize"])
def test_checkpoints_of_another_base_are_refused(runs, tmp_path, part):
    other = base()
    if part == "normalize":
        other.normalize.glob_std = other.normalize.glob_std * 1.01
    else:
        next(other.modules[part].parameters()).data += 0.01
    load = {name: saved for name, (saved, _) in runs.items()}
    parts = Parts(9, load=load)
    parts.start_from(other, tmp_path / "base")
    word = "base" if part == "Transformer" else part
    with pytest.raises(ValueError, match=f"another {word}"):
        parts("us")
    parts = Parts(9, load=load, any_base=True)
    parts.start_from(other, tmp_path / "again")
    assert torch.equal(parts("us"), parts("us"))


def test_a_checkpoint_lacks_statistics_inside_the_encoder(tmp_path, caplog):
    file = tmp_path / "model.ckpt"

    def inserted(seed, **arguments):
        torch.manual_seed(seed)
        encoder = ToyEncoder()
        encoder.normalize = InputNormalization()
        encoder.normalize(torch.randn(2, 30, 4), torch.ones(2))
        insert_adapters(encoder, NAMES, bottleneck=4, **arguments)
        return encoder.eval()

    torch.save(inserted(0).state_dict(), file)
    inserted(0, load={"us": file})(torch.randn(2, 5, 4))
    assert "lacks normalize.glob_mean, normalize.glob_std" in caplog.text
    with pytest.raises(ValueError, match="another base"):
        inserted(1, load={"us": file})(torch.randn(2, 5, 4))


def test_checkpoints_that_do_not_fit(runs, tmp_path):
    saved, _ = runs["us"]
    short = Parts(0, layers=["layers.0", "layers.1"])
    short.checkpointer(tmp_path / "short").save_checkpoint()
    plain = base()
    plain.checkpointer(tmp_path / "plain").save_checkpoint()
    for load, message in (
        (
            {"us": tmp_path / "short"},
            "for 2 layers of width 8, but .* behind 3",
        ),
        ({"us": tmp_path / "plain"}, "no checkpoint of a model with an adap"),
        ({"combined": saved}, "cannot be taken from a checkpoint"),
        (str(saved), r"say which adapter to take from it, load: {name: path}"),
        (saved / "model.ckpt", "say which adapter to take from it"),
    ):
        with pytest.raises(ValueError, match=message):
            Parts(0, load=load)
    with pytest.raises(FileNotFoundError):
        Parts(0, load={"us": tmp_path / "none.ckpt"})


# --------------------------------------------------------- what does not fit


def test_files_that_do_not_fit_are_refused_at_once(trained, tmp_path):
    files = trained.files
    alone = Parts(0, names=["french"])
    alone.handle.save_adapter("french", tmp_path / "french.safetensors")
    double = Parts(0)
    double.model.double()
    double.handle.save_adapter("us", tmp_path / "double.safetensors")
    middle = Parts(0, layers=["layers.0", "layers.1"])
    middle.handle.save_adapter("us", tmp_path / "middle.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.safetensors").write_bytes(
        (files / "us.safetensors").read_bytes()[:200]
    )
    for arguments, message in (
        ({"load": {"french": files / "us.safetensors"}}, "no adapter 'french'"),
        ({"load": tmp_path / "french.safetensors"}, "'french' is not among"),
        ({"load": {"us": files / "fusion.safetensors"}}, "found combination"),
        ({"load": {"combined": files / "us.safetensors"}}, "found adapter"),
        ({"load": {"us": tmp_path / "empty"}}, "a folder without checkpoints"),
        ({"load": tmp_path / "empty"}, "no .safetensors file in this folder"),
        ({"load": {"us": tmp_path / "half.safetensors"}}, "half-written"),
        ({"load": {"us": tmp_path / "double.safetensors"}}, "torch.float64"),
        (
            {
                "load": {"us": tmp_path / "middle.safetensors"},
                "layers": ["layers.1", "layers.2"],
            },
            "made for layer 'layers.0', where layer 'layers.1' has adapters",
        ),
        (
            {"load": by_name(trained), "activation": torch.nn.ReLU},
            "its activation is SiLU",
        ),
        (
            {"load": files / "fusion.safetensors", "names": ["us"]},
            "combines us, german, but us was asked for",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Parts(0, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"combination": "mean"}, "is AudioAdapterFusion, but AdapterMean was"),
        ({"names": ["us", "x", "german"]}, "combines us, german, but us, x,"),
        (
            {"combination": AudioAdapterFusion(running=True)},
            "its running is False, but True was asked for",
        ),
        (
            {"combination": AudioAdapterFusion(attention_dim=4)},
            "fusion.safetensors: its attention_dim is None, but 4 was asked",
        ),
        ({"names": ["us"], "combination": None}, "combines german, not among"),
    ],
)
def test_the_combination_asked_for_stays(trained, arguments, message, caplog):
    fresh = Parts(0, **arguments).handle
    parts = Parts(0, load=trained.files, **arguments).handle
    assert message in caplog.text and "was left out" in caplog.text
    assert parts.combined_names == fresh.combined_names
    for here, plain, theirs in zip(
        parts.layers, fresh.layers, trained.handle.layers
    ):
        assert type(here.combination) is type(plain.combination)
        bank, other = here.bank["us"], theirs.bank["us"]
        assert torch.equal(bank.up.weight, other.up.weight)
        if here.combination is not None:
            assert here.combination.settings() == plain.combination.settings()
            pairs = zip(
                here.combination.parameters(), plain.combination.parameters()
            )
            assert all(torch.equal(p, q) for p, q in pairs)
    if fresh.combined_names:
        file = trained.files / "fusion.safetensors"
        with pytest.raises(ValueError, match=message):
            Parts(0, load={"combined": file}, **arguments)


@pytest.mark.parametrize("kind", ["weighted_mean", "fusion"])
def test_a_combination_keeps_the_order_and_form_asked_for(tmp_path, kind):
    parts = Parts(0, combination=kind)
    scramble(parts.handle, seed=5)
    parts.handle.save(tmp_path / "all")
    template = type(parts.handle.layers[0].combination)(recompute=True)
    other = Parts(
        0, names=NAMES[::-1], combination=template, load=tmp_path / "all"
    )
    assert other.handle.combined_names == NAMES[::-1]
    assert other.handle.layers[0].combination.recompute
    torch.testing.assert_close(other("combined"), parts("combined"))


def test_a_folder_may_hold_more(trained, caplog):
    caplog.set_level(logging.INFO)
    trained.handle.add_adapter("french")
    trained.handle.save_adapter("french", trained.files / "f.safetensors")
    parts = Parts(0, load=trained.files)
    assert parts.handle.names == NAMES
    assert "f.safetensors: adapter 'french' is not among the names" in (
        caplog.text
    )


# ------------------------------------------- the handle as a recoverable


def test_the_handle_beside_the_model(trained, tmp_path):
    """Averaging finds the model; the adapters' own file loads by itself."""
    saver = trained.checkpointer(tmp_path / "save", adapters=trained.handle)
    first = saver.save_checkpoint()
    expected = trained("combined")
    scramble(trained.handle, seed=1)
    second = saver.save_checkpoint()
    mean = average_checkpoints([first, second], recoverable_name="model")
    trained.model.load_state_dict(mean, strict=True)
    name = "1.task_adapters.layers.0.bank.adapter_us.up.bias"
    states = [
        torch.load(one.path / "model.ckpt", weights_only=True)[name]
        for one in (first, second)
    ]
    torch.testing.assert_close(mean[name], sum(states) / 2)
    # The same again, by a pretrainer, into the base.
    parts = Parts(0)
    pretrainer = Pretrainer(
        collect_in=tmp_path / "collected",
        loadables={"adapters": parts.handle},
        paths={"adapters": f"{first.path}/adapters.ckpt"},
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    torch.testing.assert_close(parts("combined"), expected)
    saver.recover_if_possible()
    assert torch.equal(trained("us"), trained("us"))
    # Another file under that name is refused, though it loads loosely.
    before = parts.handle.state_dict()
    pretrainer = Pretrainer(
        collect_in=tmp_path / "wrong",
        loadables={"adapters": parts.handle},
        paths={"adapters": f"{first.path}/model.ckpt"},
    )
    pretrainer.collect_files()
    with pytest.raises(RuntimeError, match="no adapters in this file"):
        pretrainer.load_collected()
    assert all(
        torch.equal(before[k], v) for k, v in parts.handle.state_dict().items()
    )
