"""docs/adapters_in_recipes.md: a recipe trains with its YAML.

The recipe here has the parts and the habits of LibriSpeech/ASR/transformer
(averaging at test, one checkpoint kept), at toy size. What it starts from
and where it writes are overrides; the rest is what the page shows.
"""

import hashlib
import re
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch

PAGE = Path(__file__).parents[2] / "docs" / "adapters_in_recipes.md"
RECIPE = """
output_folder: !PLACEHOLDER
save_folder: !ref <output_folder>/save
pretrained_lm_tokenizer_path: !PLACEHOLDER
compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 16}
CNN: !new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd
    input_shape: (8, 10, 16)
    num_blocks: 1
    num_layers_per_block: 1
    out_channels: [4]
    kernel_sizes: [3]
    strides: [2]
    residuals: [False]
Transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    input_size: 32
    tgt_vocab: 7
    d_model: 16
    nhead: 2
    num_encoder_layers: 2
    num_decoder_layers: 1
    d_ffn: 16
    encoder_module: conformer
    attention_type: RelPosMHAXL
    normalize_before: True
    causal: False
lm_model: !new:torch.nn.Linear {in_features: 2, out_features: 2}
tokenizer: !new:torch.nn.Linear {in_features: 2, out_features: 2}
ctc_lin: !new:speechbrain.nnet.linear.Linear {input_size: 16, n_neurons: 7}
seq_lin: !new:speechbrain.nnet.linear.Linear {input_size: 16, n_neurons: 7}
normalize: !new:speechbrain.processing.features.InputNormalization
    update_until_epoch: 4
modules:
    CNN: !ref <CNN>
    Transformer: !ref <Transformer>
    seq_lin: !ref <seq_lin>
    ctc_lin: !ref <ctc_lin>
    normalize: !ref <normalize>
model: !new:torch.nn.ModuleList
    - [!ref <CNN>, !ref <Transformer>, !ref <seq_lin>, !ref <ctc_lin>]
noam_annealing: !new:speechbrain.nnet.schedulers.NoamScheduler
    lr_initial: 0.01
    n_warmup_steps: 2
epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: 2
"""
CHECKPOINTER = """
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <save_folder>
    recoverables:
        model: !ref <model>
        normalizer: !ref <normalize>
        counter: !ref <epoch_counter>
"""


def page_blocks():
    """Return the page's YAML blocks, in order."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)


ADAPTERS, PRETRAINER, PARALLEL, RECOVERABLES, SETTINGS = page_blocks()


class ASR(sb.Brain):
    """What the recipe's train.py does, without its decoding."""

    def compute_forward(self, batch, stage):
        batch = batch.to(self.device)
        wavs, lens = batch.sig
        tokens, _ = batch.tokens
        feats = self.hparams.compute_features(wavs)
        epoch = self.hparams.epoch_counter.current
        feats = self.modules.normalize(feats, lens, epoch=epoch)
        encoded, decoded = self.modules.Transformer(
            self.modules.CNN(feats), tokens, lens, pad_idx=0
        )
        return self.modules.ctc_lin(encoded), self.modules.seq_lin(decoded)

    def compute_objectives(self, predictions, batch, stage):
        ctc, seq = (p.log_softmax(-1) for p in predictions)
        target, target_lens = batch.tokens
        lens = batch.sig.lengths
        loss = sb.nnet.losses.ctc_loss(ctc, target, lens, target_lens, 0)
        return loss + sb.nnet.losses.nll_loss(seq, target, target_lens)

    def on_stage_end(self, stage, stage_loss, epoch):
        if stage == sb.Stage.TRAIN:
            return
        score = 1.1 if stage == sb.Stage.TEST else epoch / 100
        self.checkpointer.save_and_keep_only(
            meta={"ACC": score},
            max_keys=["ACC"],
            num_to_keep=1 if stage == sb.Stage.TEST else 2,
        )

    def on_evaluate_start(self, max_key=None, min_key=None):
        super().on_evaluate_start()
        found = self.checkpointer.find_checkpoints(max_key=max_key)
        mean = sb.utils.checkpoints.average_checkpoints(
            found, recoverable_name="model"
        )
        self.hparams.model.load_state_dict(mean, strict=True)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        self.hparams.noam_annealing(self.optimizer)


def data(names):
    """Return batches of noise of some domains, ragged."""
    generator = torch.Generator().manual_seed(len(names))
    items = [
        {
            "id": f"{name}-{i}",
            "sig": torch.randn(5000 + 400 * i, generator=generator),
            "tokens": torch.randint(1, 7, (3 + i % 2,), generator=generator),
        }
        for i in range(2)
        for name in names
    ]
    return torch.utils.data.DataLoader(
        items, batch_size=2, collate_fn=PaddedBatch
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return a function that runs the recipe with blocks of the page."""
    root = tmp_path_factory.mktemp("page")
    for name in ("lm", "tokenizer"):
        state = torch.nn.Linear(2, 2).state_dict()
        torch.save(state, root / f"{name}.ckpt")

    def run(output, blocks, names=("us", "de"), checkpoints=CHECKPOINTER, **o):
        torch.manual_seed(len(output))  # another start for another folder
        overrides = {
            "output_folder": str(root / output),
            "pretrained_lm_tokenizer_path": str(root),
            **o,
        }
        text = "\n".join([RECIPE, *blocks, checkpoints])
        hparams = load_hyperpyyaml(text, overrides)
        if "pretrainer" in hparams:
            hparams["pretrainer"].collect_files()
            hparams["pretrainer"].load_collected()
        brain = ASR(
            hparams["modules"],
            torch.optim.Adam,
            hparams,
            {"device": "cpu", "noprogressbar": True},
            hparams["checkpointer"],
        )
        brain.fit(hparams["epoch_counter"], data(names), data(names))
        brain.evaluate(data(names), max_key="ACC")
        (folder,) = (root / output / "save").glob("CKPT+*")
        return Kept(folder)

    return run


class Kept:
    """A run's checkpoint; what is in it, since the next run deletes it."""

    def __init__(self, folder):
        self.folder = folder
        self.model, normalizer, self.adapters = (
            torch.load(path, weights_only=True) if path.exists() else {}
            for name in ("model", "normalizer", "adapters")
            for path in [folder / f"{name}.ckpt"]
        )
        self.digests = {}
        for state in (self.model, normalizer):
            for name, value in state.items():
                content = torch.as_tensor(value).numpy().tobytes()
                self.digests[name] = hashlib.sha256(content).hexdigest()


def moved(before, after):
    """Return what differs, adapters by their names; what is new does not."""
    before, after = before.digests, after.digests
    assert before.keys() <= after.keys()
    names = {n for n in before if before[n] != after[n]}
    kinds = set()
    for name in names:
        found = re.search(r"adapter_(\w+)|(combination)", name)
        kinds.add(next(filter(None, found.groups())) if found else name)
    return kinds


@pytest.fixture(scope="module")
def base(train):
    return train("base", [])


def adapted(train, output, before, task, block=ADAPTERS, **others):
    return train(
        output,
        [block, PRETRAINER],
        start_from=str(before.folder),
        adapters={
            "train": task,
            "bottleneck": 4,
            **others.pop("arguments", {}),
        },
        **others,
    )


@pytest.fixture(scope="module")
def us(train, base):
    return adapted(train, "us", base, "us", names=["us"])


def test_one_run_after_the_other(train, base, us, caplog):
    assert moved(base, us) == set()
    de = adapted(train, "de", us, "de", names=["de"])
    assert moved(us, de) == {"de"} and moved(base, de) == set()
    fusion = adapted(train, "fusion", de, "ST-A")
    assert moved(de, fusion) == {"combination"}
    assert moved(base, fusion) == set()
    # Resumed, with one epoch more.
    more = adapted(train, "fusion", de, "ST-A", epoch_counter={"limit": 3})
    assert moved(de, more) == {"combination"}
    assert "train as well" not in caplog.text
    assert "never trained" not in caplog.text


def test_two_runs_side_by_side(train, base, us, caplog):
    de = adapted(train, "side", base, "de", names=["de"])
    load = {"us": str(us.folder.parent), "de": str(de.folder.parent)}
    options = {"block": PARALLEL, "arguments": {"load": load}}
    fusion = adapted(train, "both", base, "ST-A", **options)
    assert moved(base, fusion) == set()
    for name, value in fusion.model.items():
        if "adapter_" in name:
            own = us if "adapter_us" in name else de
            assert torch.equal(value, own.model[name]), name
    caplog.clear()
    more = adapted(
        train, "both", base, "ST-A", **options, epoch_counter={"limit": 3}
    )
    assert moved(fusion, more) == {"combination"}
    said = [r for r in caplog.records if "replace those" in r.getMessage()]
    assert all(r.levelname == "INFO" for r in said)  # equal: no warning
    # On another base it is refused before a step is made.
    other = train("another base", [])
    with pytest.raises(ValueError, match="trained on another base"):
        adapted(train, "wrong", other, "ST-A", **options)


def test_without_freeze_the_rest_trains_and_is_named(train, base, us, caplog):
    bare = adapted(
        train, "bare", us, "de", arguments={"freeze": None}, names=["de"]
    )
    changed = moved(us, bare)
    assert {"de", "glob_mean", "count"} < changed
    assert {"2.w.bias", "3.w.bias"} < changed
    assert not {"us", "combination"} & changed
    assert "train as well (parameters): CNN" in caplog.text


def test_the_handle_beside_the_model(train, us):
    kept = adapted(
        train,
        "recoverable",
        us,
        "ST-A",
        block=SETTINGS,
        checkpoints=RECOVERABLES,
    )
    assert kept.adapters
    for name, value in kept.adapters.items():
        assert torch.equal(kept.model[f"1.task_adapters.{name}"], value)
