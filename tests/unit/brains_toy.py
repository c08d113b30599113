"""A toy lifelong Brain for the tests: three "accents" of three words.

Every word is a pattern of frames; an accent turns the patterns a little.
"""

import functools
import types

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.nnet.losses import ctc_loss
from speechbrain.nnet.schedulers import LinearWarmupScheduler
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_taskarith.brains import (
    CharacterLabels,
    CTCBrain,
    CTCNetwork,
    Domain,
    SequentialMixin,
    shard_loader,
)

WORDS = ("A", "B", "C")


class Encoder(torch.nn.Module):
    """Two linear layers; takes lengths as SpeechBrain's encoders do."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 12)
        self.second = torch.nn.Linear(12, 12)

    def forward(self, x, lens):
        return torch.tanh(self.second(torch.tanh(self.first(x))))


def frames(item):
    """Frames of one utterance: each word's pattern, turned by the accent."""
    generator = torch.Generator().manual_seed(item["seed"])
    patterns = torch.eye(6)[:3]
    turn = torch.tensor(item["turn"])
    patterns = patterns * turn.cos() + torch.eye(6)[3:] * turn.sin()
    parts = []
    for word in item["wrd"].split():
        parts += [patterns[WORDS.index(word)].expand(3, -1), torch.zeros(2, 6)]
    x = torch.cat(parts[:-1])  # silence between words only
    return x + 0.1 * torch.randn(x.shape, generator=generator)


class ToyBrain(SequentialMixin, CTCBrain):
    def make_train_loader(self, items):
        return shard_loader(dataset(items), self.hparams.batch_size)

    def make_item_batch(self, item):
        return PaddedBatch([dataset([item])[0]])


def dataset(items):
    labels = CharacterLabels(" ABC")
    named = {
        f"{n:04d}": {
            "item": types.SimpleNamespace(**item),
            "wrd": item["wrd"],
        }
        for n, item in enumerate(items)
    }
    data = DynamicItemDataset(named)
    data.add_dynamic_item(
        lambda item: frames(vars(item)), takes="item", provides="sig"
    )
    data.add_dynamic_item(labels.encode, takes="wrd", provides="tokens")
    data.set_output_keys(["id", "sig", "tokens", "wrd"])
    return data


def domains(count=48, test=12):
    made = []
    for number, turn in enumerate((0.0, 0.8, 1.5)):
        chance = torch.Generator().manual_seed(number)

        def some(how_many, name, chance=chance, turn=turn):
            return [
                {
                    "ID": f"{name}{n}",
                    "seed": int(torch.randint(2**31, (), generator=chance)),
                    "turn": turn,
                    "wrd": " ".join(
                        WORDS[k]
                        for k in torch.randint(
                            3, (1 + n % 3,), generator=chance
                        ).tolist()
                    ),
                }
                for n in range(how_many)
            ]

        name = f"d{number}"
        loaders = [
            torch.utils.data.DataLoader(
                dataset(some(test, name)), batch_size=6, collate_fn=PaddedBatch
            )
            for _ in "vt"
        ]
        made.append(Domain(name, some(count, name), *loaders))
    return made


def make_brain(seed=0, epochs=2, device="cpu", **run_opts):
    torch.manual_seed(seed)
    model = CTCNetwork(Encoder(), torch.nn.Linear(12, 5))
    hparams = {
        "seed": seed,
        "model": model,
        "batch_size": 4,
        "tokenizer": CharacterLabels(" ABC"),
        "blank_index": 0,
        "ctc_cost": functools.partial(
            ctc_loss, blank_index=0, reduction="batchmean"
        ),
        "epoch_counter": EpochCounter(limit=epochs),
        "opt_class": torch.optim.AdamW,
        "make_lr_annealing": LinearWarmupScheduler,
        "warmup_share": 0.1,
    }
    options = {"device": device, "noprogressbar": True, **run_opts}
    brain = ToyBrain({"model": model}, hparams=hparams, run_opts=options)
    brain.lr = 0.05
    return brain


def initial(brain):
    state = brain.hparams.model.state_dict()
    return {name: value.clone() for name, value in state.items()}
