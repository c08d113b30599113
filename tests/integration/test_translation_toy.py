"""Text and speech made here: the whole method beats speech translation alone.

A sentence is some words; its "speech" are the words' vectors, each held for a
random time between silences, with noise; its translation says other words in
another order. There is little speech and more text.
"""

import sys
from pathlib import Path

import pytest
import torch
from speechbrain.decoders import ctc_greedy_decode
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from translation_toy import BOS, EOS, toy_model  # noqa: E402

from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.translation import (
    AcousticEncoder,
    BlankNoise,
    TaskNormWeights,
    TranslationObjective,
    greedy_translation,
)

WORDS, FEATURES = 8, 10
VOICES = torch.randn(
    WORDS + 1, FEATURES, generator=torch.Generator().manual_seed(0)
)


def sentences(count, seed, least=3, most=5, pauses=True):
    """Return batches of speech, transcript and translation."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        n = int(torch.randint(least, most + 1, (1,), generator=g))
        words = torch.randint(1, WORDS + 1, (n,), generator=g)
        held = torch.randint(2, 5, (2 * n,), generator=g)
        sounds = torch.stack([words, torch.zeros_like(words)], 1).flatten()
        if not pauses:
            held = 2 * held
            held[1::2] = 0
        frames = VOICES[sounds].repeat_interleave(held, 0)
        noise = torch.randn(frames.shape, generator=g)
        # The last word first, in other words.
        target = (words.flip(0) + 2) % WORDS + 3
        rows.append((frames + 0.5 * noise, words, target))
    return rows


def collate(rows):
    """Pad a batch; return inputs and targets as `toy_batch` does."""

    def padded(parts):
        x = pad_sequence(parts, batch_first=True)
        return x, torch.tensor([len(p) for p in parts]) / x.shape[1]

    x, lens = padded([row[0] for row in rows])
    source, source_lens = padded([row[1] for row in rows])
    bos, eos = torch.tensor([BOS]), torch.tensor([EOS])
    target_bos, _ = padded([torch.cat([bos, row[2]]) for row in rows])
    target_eos, lens_eos = padded([torch.cat([row[2], eos]) for row in rows])
    inputs = {
        "x": x,
        "lens": lens,
        "source": source,
        "source_lens": source_lens,
        "target_bos": target_bos,
    }
    return inputs, {
        "source": source,
        "source_lens": source_lens,
        "target_eos": target_eos,
        "target_lens": lens_eos,
    }


def accuracy(model, rows):
    """Return how many words of the references are in their place, in %."""
    inputs, _ = collate(rows)
    model.eval()
    with torch.no_grad():
        speech = model.encode_speech(inputs["x"], inputs["lens"])
    found = greedy_translation(
        model.decoder, speech.encoded, speech.lens, BOS, EOS, max_tokens=8
    )
    model.train()
    pairs = [(row[2].tolist(), words) for row, words in zip(rows, found)]
    right = sum(a == b for ref, hyp in pairs for a, b in zip(ref, hyp))
    return 100 * right / sum(len(ref) for ref, _ in pairs)


def train(tasks, whole, seed, updates=250):
    """Train a model of a kind; return its accuracy on other sentences."""
    speech, text = sentences(64, seed=1), sentences(256, seed=2)
    noise = BlankNoise(0, seed=seed) if whole else None
    model = toy_model(
        WORDS + 1,
        WORDS + 3,
        width=32,
        layers=2,
        features=FEATURES,
        shrink=whole,
        local=whole,
        noise=noise,
        seed=seed,
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    objective = TranslationObjective(0, 0.7 if whole else 1.0)
    weights = TaskNormWeights(
        [t for t in tasks if t != "st"], interval=50, exponent=0.5
    )
    g = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        losses = {}
        speaking = [t for t in weights.active if t != "mt"]
        rows = torch.randperm(len(speech), generator=g)[:16]
        inputs, targets = collate([speech[i] for i in rows])
        losses.update(objective(model(tasks=speaking, **inputs), **targets))
        if "mt" in weights.active:
            rows = torch.randperm(len(text), generator=g)[:16]
            inputs, targets = collate([text[i] for i in rows])
            out = model(tasks=("mt",), **inputs)
            losses.update(objective(out, **targets))
        if weights.due:
            weights.observe(losses, model.parts())
        optimizer.zero_grad()
        weights.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        weights.step()
    return accuracy(model, sentences(100, seed=3))


@pytest.mark.slow
def test_the_whole_method_is_ahead_of_speech_translation_alone():
    alone = train(("st",), whole=False, seed=0)
    whole = train(("st", "asr", "mt"), whole=True, seed=0)
    assert whole > alone + 5, (whole, alone)


def ctc_loss_and_errors(model, rows):
    """Return the CTC loss and the word errors, in %, of the model's head."""
    inputs, targets = collate(rows)
    model.eval()
    with torch.no_grad():
        out = model(tasks=("asr",), **inputs)
        objective = TranslationObjective(0, contrastive=0.0)
        loss = objective(out, **targets)["asr"]
    model.train()
    speech = out.speech
    found = ctc_greedy_decode(speech.logits, speech.frame_lens, 0)
    said, heard = (
        [" ".join(map(str, tokens)) for tokens in texts]
        for texts in ([row[1].tolist() for row in rows], found)
    )
    return float(loss), wer(said, heard).wer


class Deeper(torch.nn.Module):
    """An acoustic encoder with something to lose."""

    def __init__(self, features, width):
        super().__init__()
        self.first = torch.nn.Conv1d(features, width, 5, 2, 2)
        self.second = torch.nn.Conv1d(width, width, 5, padding=2)
        self.norms = torch.nn.ModuleList(
            torch.nn.LayerNorm(width) for _ in range(2)
        )

    def forward(self, x, lens):
        x = self.first(x.mT).relu().mT
        x = self.norms[0](x)
        return self.norms[1](x + self.second(x.mT).relu().mT)


def train_past_the_stop(ctc_in_st, before=200, after=200, seed=1):
    """Train with recognition, then without; return the figures of both."""
    model = toy_model(
        WORDS + 1, WORDS + 3, width=32, features=FEATURES, seed=seed
    )
    model.acoustic = AcousticEncoder(Deeper(FEATURES, 32), 32)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    objective = TranslationObjective(0, ctc_in_st=ctc_in_st)
    running = TaskNormWeights(("asr",), interval=10_000)
    stopped = TaskNormWeights(("asr",), initial={"asr": 0.0})
    long = {"least": 8, "most": 8, "pauses": False}
    test, found = sentences(64, seed=3, **long), []
    for weights, updates in ((running, before), (stopped, after)):
        for update in range(updates):
            rows = sentences(16, seed=1000 * seed + updates + update, **long)
            inputs, targets = collate(rows)
            out = model(tasks=weights.active, **inputs)
            optimizer.zero_grad()
            weights.total(objective(out, **targets)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        found.append(ctc_loss_and_errors(model, test))
    return found


@pytest.mark.slow
def test_recognition_does_not_decay_once_its_task_has_stopped():
    (loss, errors), (later, errors_later) = train_past_the_stop(True)
    assert errors < 20, "the head was trained"
    assert later <= loss and errors_later <= errors + 1
    # The split objective shows that it could.
    (loss, _), (later, _) = train_past_the_stop(False)
    assert later > 1.2 * loss
