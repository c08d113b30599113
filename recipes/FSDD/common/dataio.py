"""From planned strings of digits to the batches of a Brain."""

import functools

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset

from common.digits import AudioCache, DigitStringLoader


@functools.lru_cache(maxsize=4)
def audio_cache(sample_rate):
    """Return the cache that all trainings of this process share."""
    return AudioCache(sample_rate)


def make_dataset(
    strings, tokenizer, sample_rate, keys=("id", "sig", "tokens", "wrd")
):
    """Make a data set of strings, in their order."""
    # A remembered string may come several times: number them.
    data = DynamicItemDataset(
        {f"{n:06d}-{string['ID']}": string for n, string in enumerate(strings)}
    )
    data.add_dynamic_item(
        DigitStringLoader(sample_rate, cache=audio_cache(sample_rate)),
        takes=["wavs", "gaps"],
        provides="sig",
    )
    data.add_dynamic_item(tokenizer.encode, takes="wrd", provides="tokens")
    data.set_output_keys(list(keys))
    return data


def evaluation_loader(strings, hparams, tokenizer=None):
    """Make a loader of all strings, the shortest first."""
    data = make_dataset(
        sorted(strings, key=lambda string: string["duration"]),
        tokenizer or hparams["tokenizer"],
        hparams["sample_rate"],
    )
    return torch.utils.data.DataLoader(
        data, batch_size=hparams["test_batch_size"], collate_fn=PaddedBatch
    )


def in_memory(loader):
    """Put all batches together once, to measure many models on them."""
    return torch.utils.data.DataLoader(
        list(loader), batch_size=None, collate_fn=_unchanged
    )


def _unchanged(batch):
    return batch
