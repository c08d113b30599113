"""A ready Brain for strings of words, with domain after domain to train on."""

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset

from common.digits import DigitStringLoader
from speechbrain_taskarith.brains import (
    CTCBrain,
    SequentialMixin,
    shard_loader,
)


class DigitStringBrain(SequentialMixin, CTCBrain):
    """CTC on strings of words that are put together when they are asked for.

    Besides what `CTCBrain` and `SequentialMixin` read, `hparams` holds
    `sample_rate`, `batch_size` and `test_batch_size`. Utterances are plain
    descriptions, as `data.make_digit_strings` plans them.

    Arguments
    ---------
    *arguments, **keywords : object
        As for `speechbrain.Brain`.
    cache : AudioCache or None
        Of decoded or synthetic recordings; None makes one.

    Example
    -------
    >>> from speechbrain_taskarith.brains import WordLabels
    >>> brain = DigitStringBrain(
    ...     modules={"model": torch.nn.Linear(1, 1)},
    ...     hparams={"sample_rate": 8000, "tokenizer": WordLabels(["ONE"])},
    ...     run_opts={"device": "cpu"},
    ... )
    >>> item = {"ID": "a", "wavs": [], "gaps": [0.5], "wrd": "ONE"}
    >>> brain.dataset([item]).data_ids
    ['000000-a']
    """

    def __init__(self, *arguments, cache=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.load_audio = DigitStringLoader(
            self.hparams.sample_rate, cache=cache
        )

    def dataset(self, items):
        """Make a data set out of descriptions.

        Arguments
        ---------
        items : list of dict
            With `ID`, `wavs`, `gaps` and `wrd`.

        Returns
        -------
        DynamicItemDataset
            With `id`, `sig`, `tokens` and `wrd`, in this order of items.
        """
        # A remembered utterance may come several times: number them.
        named = {f"{n:06d}-{item['ID']}": item for n, item in enumerate(items)}
        data = DynamicItemDataset(named)
        data.add_dynamic_item(
            self.load_audio, takes=["wavs", "gaps"], provides="sig"
        )
        data.add_dynamic_item(
            self.hparams.tokenizer.encode, takes="wrd", provides="tokens"
        )
        data.set_output_keys(["id", "sig", "tokens", "wrd"])
        return data

    def make_train_loader(self, items):
        """See `SequentialMixin.make_train_loader`."""
        return shard_loader(self.dataset(items), self.hparams.batch_size)

    def make_item_batch(self, item):
        """See `SequentialMixin.make_item_batch`."""
        return PaddedBatch([self.dataset([item])[0]])

    def evaluation_loader(self, items):
        """Make a loader of all strings, the shortest first.

        Arguments
        ---------
        items : list of dict
            Descriptions.

        Returns
        -------
        torch.utils.data.DataLoader
            What `evaluate` and `fit` take.
        """
        return torch.utils.data.DataLoader(
            self.dataset(sorted(items, key=lambda item: item["duration"])),
            batch_size=self.hparams.test_batch_size,
            collate_fn=PaddedBatch,
        )
