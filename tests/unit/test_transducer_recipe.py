"""The YAML of docs/transducers_in_recipes.md inside SpeechBrain's transducer recipe.

The Brain below has the lines of that recipe's train.py which the YAML touches.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.decoders.transducer import TransducerBeamSearcher

from speechbrain_taskarith.transducer import HATOutput, transfer_encoder

PAGE = Path(__file__).parents[2] / "docs" / "transducers_in_recipes.md"

# The keys of LibriSpeech/ASR/transducer/hparams/conformer_transducer.yaml that
# decoding and loss refer to, as they stand there, with a small encoder.
RECIPE = """\
d_model: 6
joint_dim: 8
output_neurons: 7
dec_dim: 5
blank_index: 0
beam_size: 3
nbest: 2
lm_weight: 0.50

enc: !new:torch.nn.Linear {in_features: 4, out_features: !ref <d_model>}
proj_enc: !new:speechbrain.nnet.linear.Linear
   input_size: !ref <d_model>
   n_neurons: !ref <joint_dim>
   bias: False
proj_dec: !new:speechbrain.nnet.linear.Linear
   input_size: !ref <dec_dim>
   n_neurons: !ref <joint_dim>
   bias: False
emb: !new:speechbrain.nnet.embedding.Embedding
   num_embeddings: !ref <output_neurons>
   consider_as_one_hot: True
   blank_id: !ref <blank_index>
dec: !new:speechbrain.nnet.RNN.LSTM
   input_shape: [null, null, !ref <output_neurons> - 1]
   hidden_size: !ref <dec_dim>
   num_layers: 1
   re_init: True
Tjoint: !new:speechbrain.nnet.transducer.transducer_joint.Transducer_joint
   joint: sum
   nonlinearity: !name:torch.nn.GELU

transducer_lin: !new:speechbrain.nnet.linear.Linear
   input_size: !ref <joint_dim>
   n_neurons: !ref <output_neurons>
   bias: False

transducer_cost: !name:speechbrain.nnet.losses.transducer_loss
   blank_index: !ref <blank_index>

lm_model: !new:speechbrain.lobes.models.RNNLM.RNNLM
   output_neurons: !ref <output_neurons>
   embedding_dim: 4
   rnn_layers: 1
   rnn_neurons: 4
   dnn_neurons: 4
   return_hidden: True

modules:
   enc: !ref <enc>
   emb: !ref <emb>
   dec: !ref <dec>
   Tjoint: !ref <Tjoint>
   transducer_lin: !ref <transducer_lin>
   lm_model: !ref <lm_model>
   proj_dec: !ref <proj_dec>
   proj_enc: !ref <proj_enc>

model: !new:torch.nn.ModuleList
   - [!ref <enc>, !ref <emb>, !ref <dec>, !ref <proj_enc>, !ref <proj_dec>, !ref <transducer_lin>]

Greedysearcher: !new:speechbrain.decoders.transducer.TransducerBeamSearcher
   decode_network_lst: [!ref <emb>, !ref <dec>, !ref <proj_dec>]
   tjoint: !ref <Tjoint>
   classifier_network: [!ref <transducer_lin>]
   blank_id: !ref <blank_index>
   beam_size: 1
   nbest: 1

Beamsearcher: !new:speechbrain.decoders.transducer.TransducerBeamSearcher
   decode_network_lst: [!ref <emb>, !ref <dec>, !ref <proj_dec>]
   tjoint: !ref <Tjoint>
   classifier_network: [!ref <transducer_lin>]
   blank_id: !ref <blank_index>
   beam_size: !ref <beam_size>
   nbest: !ref <nbest>
   lm_module: !ref <lm_model>
   lm_weight: !ref <lm_weight>
   state_beam: 2.3
   expand_beam: 2.3
"""  # noqa: E501


def keys(text):
    """Split YAML into `{top-level key: its lines}`."""
    text = re.sub(r"^#.*\n", "", text, flags=re.M)
    parts = re.split(r"^(?=\w+:)", text, flags=re.M)
    return {part.partition(":")[0]: part for part in parts if part.strip()}


def changed(without=()):
    """Return the recipe's YAML with the page's keys in their places."""
    page = PAGE.read_text(encoding="utf-8")
    block = keys(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    assert {"transducer_cost", "Greedysearcher", "Beamsearcher"} <= set(block)
    for name in without:
        del block[name]
    return "".join({**keys(RECIPE), **block}.values())


class ASR(sb.Brain):
    """What upstream's train.py does with the keys, without augmentation."""

    def compute_forward(self, batch, stage):
        feats, lens = batch.feats
        tokens_with_bos, _ = batch.tokens_bos
        x = self.modules.proj_enc(self.modules.enc(feats))
        e_in = self.modules.emb(tokens_with_bos)
        h, _ = self.modules.dec(e_in)
        h = self.modules.proj_dec(h)
        joint = self.modules.Tjoint(x.unsqueeze(2), h.unsqueeze(1))
        logits = self.modules.transducer_lin(joint)
        if stage == sb.Stage.TRAIN:
            return logits, lens, None
        search = self.hparams.Beamsearcher
        if stage == sb.Stage.VALID:
            search = self.hparams.Greedysearcher
        best_hyps, scores, nbest_hyps, nbest_scores = search(x)
        self.found[stage] = x, best_hyps, scores, nbest_hyps, nbest_scores
        return logits, lens, best_hyps

    def compute_objectives(self, predictions, batch, stage):
        logits, lens, _ = predictions
        tokens, token_lens = batch.tokens
        return self.hparams.transducer_cost(logits, tokens, lens, token_lens)


def corpus():
    made = torch.Generator().manual_seed(0)
    data = {}
    for i, (frames, labels) in enumerate([(6, 3), (4, 1), (5, 2), (3, 2)]):
        tokens = torch.randint(1, 7, (labels,), generator=made)
        data[f"u{i}"] = {
            "feats": torch.randn(frames, 4, generator=made),
            "tokens": tokens,
            "tokens_bos": torch.cat((torch.tensor([0]), tokens)),
        }
    return DynamicItemDataset(data, [], ["id", "feats", "tokens", "tokens_bos"])


@cache
def trained(without=()):
    """Train and test once; return Brain, hparams and the first weights."""
    torch.manual_seed(1)
    hparams = load_hyperpyyaml(changed(without))
    before = {k: v.clone() for k, v in hparams["model"].state_dict().items()}
    brain = ASR(
        hparams["modules"],
        lambda parameters: torch.optim.Adam(parameters, 0.1),
        hparams,
        {"device": "cpu"},
    )
    brain.found = {}
    loaders = 2 * ({"batch_size": 2},)
    brain.fit(range(20), corpus(), corpus(), False, *loaders)
    brain.evaluate(corpus(), test_loader_kwargs={"batch_size": 4})
    return brain, hparams, before


@pytest.mark.parametrize("without", [(), ("transducer_lin",)])
def test_the_recipe_trains_validates_and_tests(without):
    brain, hparams, before = trained(without)
    after = hparams["model"].state_dict()
    for name, parameter in hparams["model"].named_parameters():
        still = torch.equal(after[name], before[name])
        assert still != parameter.requires_grad, name
    hat = not without
    assert isinstance(hparams["transducer_lin"], HATOutput) == hat
    x, best, scores, n_best, n_best_scores = brain.found[sb.Stage.TEST]
    assert len(best) == len(scores) == len(n_best) == len(x) == 4
    for one, several, their_scores in zip(best, n_best, n_best_scores):
        assert all(type(label) is int and 0 < label < 7 for label in one)
        assert several[0] == one and len(several) == 2
        assert their_scores == sorted(their_scores, reverse=True)


@pytest.mark.parametrize("without", [(), ("transducer_lin",)])
def test_greedy_finds_what_speechbrains_searcher_finds(without):
    brain, hparams, _ = trained(without)
    x, best, *_ = brain.found[sb.Stage.VALID]
    theirs = TransducerBeamSearcher(
        [hparams["emb"], hparams["dec"], hparams["proj_dec"]],
        hparams["Tjoint"],
        [hparams["transducer_lin"]],
        blank_id=0,
        beam_size=1,
    )
    with torch.no_grad():
        expected = theirs(x)[0]
    assert best == expected and any(best)


def test_language_models_take_part_in_the_test_search():
    brain, hparams, _ = trained()
    x, best, scores, *_ = brain.found[sb.Stage.TEST]
    search = hparams["Beamsearcher"]
    assert search.label_scores.lm is hparams["lm_model"]
    searches = {}
    for lm, ilm in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.2), (0.5, 0.2)):
        search.label_scores.lm_weight, search.label_scores.ilm_weight = lm, ilm
        searches[lm, ilm] = search(x).scores
    assert torch.equal(searches[0.5, 0.2], scores)
    rows = torch.stack(list(searches.values()))
    assert len(rows.unique(dim=0)) == 4


def test_weights_of_an_rnnt_output_are_refused_by_name(tmp_path):
    rnnt = load_hyperpyyaml(changed(("transducer_lin",)))
    hat = load_hyperpyyaml(changed())
    path = tmp_path / "model.ckpt"
    torch.save(rnnt["model"].state_dict(), path)
    before = [p.clone() for p in hat["transducer_lin"].parameters()]
    message = "5.w.weight is the output layer of an RNN-T.*transfer_encoder"
    pretrainer = sb.utils.parameter_transfer.Pretrainer(
        tmp_path, {"model": hat["model"]}, {"model": str(path)}
    )
    pretrainer.collect_files()
    for load in (
        pretrainer.load_collected,
        lambda: hat["model"].load_state_dict(torch.load(path)),
    ):
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            load()
    for old, new in zip(before, hat["transducer_lin"].parameters()):
        assert torch.equal(old, new)
    # The message's way on.
    transfer_encoder(path, hat["enc"], prefix="0.")
    assert torch.equal(hat["enc"].weight, rnnt["enc"].weight)
    again = load_hyperpyyaml(changed())
    again["model"].load_state_dict(hat["model"].state_dict())
