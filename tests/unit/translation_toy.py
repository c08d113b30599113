"""Small batches and models for the tests of translation."""

import torch

from speechbrain_taskarith.translation import (
    AcousticEncoder,
    CTCShrink,
    LookingBack,
    SpeechTranslationModel,
    TextEncoder,
    TranslationDecoder,
)

BOS, EOS = 1, 2


def runs_of_labels(batch, frames, vocab, mean=3, seed=0):
    """Return labels in runs: [batch, frames]."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.rand(batch, frames, generator=generator) < 1 / mean
    drawn = torch.randint(vocab, (batch, frames), generator=generator)
    steps = torch.arange(frames)
    first = torch.where(change, steps, 0).cummax(1).values
    return drawn.gather(1, first)


def shrink_batch(lens, vocab=5, width=4, seed=0, dtype=torch.float64):
    """Return features, logits and relative lengths of ragged utterances."""
    generator = torch.Generator().manual_seed(seed)
    frames = max(lens)
    labels = runs_of_labels(len(lens), frames, vocab, seed=seed)
    logits = torch.randn(len(lens), frames, vocab, generator=generator).to(
        dtype
    )
    logits = logits.scatter_add(
        2, labels[..., None], torch.full_like(logits, 4.0)
    )
    x = torch.randn(len(lens), frames, width, generator=generator).to(dtype)
    return x, logits, torch.tensor(lens) / frames


class Front(torch.nn.Module):
    """An acoustic encoder that halves the frames."""

    def __init__(self, features, width):
        super().__init__()
        self.conv = torch.nn.Conv1d(features, width, 3, 2, 1)

    def forward(self, x, lens):
        return self.conv(x.transpose(1, 2)).transpose(1, 2).tanh()


def toy_model(
    source_vocab=6,
    target_vocab=8,
    width=16,
    layers=2,
    features=5,
    dropout=0.0,
    shrink=True,
    look=True,
    local=True,
    seed=0,
    **settings,
):
    """Return a whole model of some thousand parameters."""
    torch.manual_seed(seed)
    return SpeechTranslationModel(
        AcousticEncoder(Front(features, width), width),
        TextEncoder(width, 2, layers, dropout=dropout, local=local),
        TranslationDecoder(target_vocab, width, 2, 1, dropout=dropout),
        source_vocab=source_vocab,
        shrink=CTCShrink() if shrink else None,
        looking_back=LookingBack(width, 2, dropout=dropout)
        if shrink and look
        else None,
        **settings,
    )


def toy_batch(batch=4, seed=0, features=5):
    """Return the inputs and targets of a batch for `toy_model`."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(3, 8, (batch, 4), generator=g)
    bos = torch.full((batch, 1), BOS)
    inputs = {
        "x": torch.randn(batch, 24, features, generator=g),
        "lens": torch.linspace(0.5, 1.0, batch),
        "source": torch.randint(1, 6, (batch, 5), generator=g),
        "source_lens": torch.linspace(1.0, 0.6, batch),
        "target_bos": torch.cat([bos, target], 1),
    }
    targets = {
        "source": inputs["source"],
        "source_lens": inputs["source_lens"],
        "target_eos": torch.cat([target, torch.full((batch, 1), EOS)], 1),
        "target_lens": torch.ones(batch),
    }
    return inputs, targets
