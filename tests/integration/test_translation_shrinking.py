"""The page's YAML in a recipe like SpeechBrain's: one process and two."""

import logging
import os
import re
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml

PAGE = Path(__file__).parents[2] / "docs" / "translation_in_recipes.md"
STOCK = """
d_model: 32
nhead: 2
output_neurons: 12
blank_index: 3
pad_index: 0
bos_index: 1
eos_index: 2
Transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    input_size: 20
    tgt_vocab: !ref <output_neurons>
    d_model: !ref <d_model>
    nhead: !ref <nhead>
    num_encoder_layers: 1
    num_decoder_layers: 1
    d_ffn: 32
    dropout: 0.0
    encoder_module: conformer
    attention_type: RelPosMHAXL
    normalize_before: True
    causal: False
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
seq_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
modules:
    Transformer: !ref <Transformer>
    seq_lin: !ref <seq_lin>
    ctc_lin: !ref <ctc_lin>
model: !new:torch.nn.ModuleList
    - [!ref <Transformer>, !ref <seq_lin>, !ref <ctc_lin>]
ctc_scorer: !new:speechbrain.decoders.scorer.CTCScorer
    eos_index: !ref <eos_index>
    blank_index: !ref <blank_index>
    ctc_fc: !ref <ctc_lin>
search: !new:speechbrain.decoders.S2STransformerBeamSearcher
    modules: [!ref <Transformer>, !ref <seq_lin>]
    bos_index: !ref <bos_index>
    eos_index: !ref <eos_index>
    min_decode_ratio: 0.0
    max_decode_ratio: 0.4
    beam_size: 2
    using_eos_threshold: False
    scorer: !new:speechbrain.decoders.scorer.ScorerBuilder
        full_scorers: [!ref <ctc_scorer>]
        weights: {ctc: 0.4}
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <folder>
    recoverables:
        model: !ref <model>
"""


BLOCKS = [
    block
    for block in re.findall(
        r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S
    )
    if "ShrinkingTransformer" in block
]


def page_yaml(folder, block=0, **changes):
    """Load the stock YAML with the change that a block of the page shows."""
    text = STOCK.replace("Transformer: !new", "transformer: !new")
    text += BLOCKS[block] + f"folder: {folder}\n"
    torch.manual_seed(0)
    hparams = load_hyperpyyaml(text, overrides=changes)
    # A head that sees more than one label before any training.
    torch.nn.init.normal_(hparams["ctc_lin"].w.weight)
    return hparams


def item(row):
    """Return one utterance: features, and tokens of its own."""
    g = torch.Generator().manual_seed(row)
    # Long and short by turns: each process has both.
    frames, tokens = (24, 4) if row // 2 % 2 else (20, 3)
    words = torch.randint(4, 12, (tokens,), generator=g)
    return {
        "id": f"utt{row}",
        "sig": torch.randn(frames, 20, generator=g),
        "tokens": words,
        "tokens_bos": torch.cat([torch.tensor([1]), words]),
        "tokens_eos": torch.cat([words, torch.tensor([2])]),
    }


class Brain(sb.Brain):
    """What the `train.py` of SpeechBrain's Transformer recipes computes."""

    with_ctc = True

    def compute_forward(self, batch, stage):
        src, lens = batch.sig
        frames, pred = self.modules.Transformer(
            src, batch.tokens_bos[0], lens, pad_idx=self.hparams.pad_index
        )
        p_ctc = None
        if self.with_ctc:
            p_ctc = self.modules.ctc_lin(frames).log_softmax(-1)
        p_seq = self.modules.seq_lin(pred).log_softmax(-1)
        self.hyps = []
        if stage != sb.Stage.TRAIN:
            self.hyps = self.hparams.search(frames.detach(), lens)[0]
        return p_ctc, p_seq, lens

    def compute_objectives(self, predictions, batch, stage):
        p_ctc, p_seq, lens = predictions
        loss = sb.nnet.losses.kldiv_loss(
            p_seq,
            batch.tokens_eos[0],
            length=batch.tokens_eos[1],
            reduction="batchmean",
        )
        if p_ctc is not None:
            loss = loss + sb.nnet.losses.ctc_loss(
                p_ctc,
                batch.tokens[0],
                lens,
                batch.tokens[1],
                self.hparams.blank_index,
                reduction="batchmean",
            )
        return loss

    def optimizers_step(self):
        # Gradients are looked at before they are set to None.
        self.gradients = {
            name: None if p.grad is None else p.grad.clone()
            for name, p in self.hparams.model.named_parameters()
        }
        super().optimizers_step()


def brain(hparams, cls=Brain, **run_opts):
    """Return a Brain with the hparams of a recipe."""
    return cls(
        hparams["modules"],
        lambda parameters: torch.optim.SGD(parameters, 0.01),
        hparams,
        {"device": "cpu", "noprogressbar": True, **run_opts},
        hparams["checkpointer"],
    )


def batches(rows):
    """Return what loads batches of two utterances."""
    return torch.utils.data.DataLoader(
        [item(row) for row in rows],
        batch_size=2,
        collate_fn=sb.dataio.batch.PaddedBatch,
    )


def assert_trained(gradients, head=True):
    """Assert a gradient in every part of the model."""
    parts = {}
    for name, gradient in gradients.items():
        part = re.search(
            r"^1|^2|encoder|decoder|looking_back|textual|custom", name
        )[0]
        size = 0.0 if gradient is None else float(gradient.norm())
        parts.setdefault(part, []).append(size)
    assert {"encoder", "decoder", "looking_back", "1", "2"} < set(parts)
    for part, sizes in parts.items():
        if part != "2" or head:
            # No softmax sees the bias of a key.
            assert sum(size < 1e-6 for size in sizes) <= 1, part


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_pages_yaml_trains_searches_and_resumes(block, tmp_path, caplog):
    hparams = page_yaml(tmp_path, block)
    start = {n: t.clone() for n, t in hparams["model"].state_dict().items()}
    first = brain(hparams)
    with caplog.at_level(logging.WARNING):
        first.fit(range(2), batches(range(4)), batches(range(4, 6)))
    assert_trained(first.gradients)
    assert len(first.hyps) == 2
    assert "LookingBack" not in caplog.text and "CTC" not in caplog.text
    first.checkpointer.save_checkpoint()
    trained = hparams["model"].state_dict()
    # No softmax sees the bias of a key; the others are not trained.
    still = ("key.bias", "inv_freq", ".pe", "noise.calls")
    for name, tensor in trained.items():
        moved = not torch.equal(tensor, start[name])
        assert moved or name.endswith(still), name
    again = page_yaml(tmp_path, block)
    second = brain(again)
    second.evaluate(batches(range(4, 6)))
    assert second.hyps == first.hyps
    for name, tensor in again["model"].state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def process(rank, folder):
    """Train in one of two processes, with and without CTC's loss."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    opts = {"distributed_launch": True, "distributed_backend": "gloo"}
    found = {}
    for pooling in ("first", "weighted"):
        hparams = page_yaml(Path(folder) / pooling, **changes(pooling))
        one = brain(hparams, **opts)
        # Two steps: DDP reports parameters without gradient in the second.
        one.fit(range(2), batches(range(2 * rank, 2 * rank + 2)))
        found[pooling] = {
            "model": hparams["model"].state_dict(),
            "gradients": one.gradients,
        }

    class WithoutCTC(Brain):
        with_ctc = False

    hparams = page_yaml(Path(folder) / "none", **changes("weighted"))
    try:
        brain(hparams, WithoutCTC, **opts).fit(
            range(2), batches(range(2 * rank, 2 * rank + 2))
        )
    except RuntimeError as error:
        found["refused"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def changes(pooling):
    """Return overrides of the page's YAML for another pooling."""
    trained = pooling != "first"
    shrink = {"pooling": pooling, "train_weights": trained}
    return {"Transformer": {"shrink": shrink}}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    found, other = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for rank in range(2)
    )
    assert "processes would drift apart" in found["refused"]
    for pooling in ("first", "weighted"):
        assert_trained(found[pooling]["gradients"])
        hparams = page_yaml(tmp_path / "one" / pooling, **changes(pooling))
        alone = brain(hparams, grad_accumulation_factor=2)
        alone.fit(range(2), batches(range(4)))
        for name, tensor in hparams["model"].state_dict().items():
            one, two = (f[pooling]["model"][name] for f in (found, other))
            assert torch.equal(one, two), name
            torch.testing.assert_close(
                one, tensor, atol=2e-5, rtol=1e-3, msg=name
            )
