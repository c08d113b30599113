"""A partly frozen encoder in two processes: one gradient, that of all data."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from hugging_face_toy import save_whisper  # noqa: E402

from speechbrain_taskarith.translation import (
    SpeechTranslationModel,
    TextEncoder,
    TranslationDecoder,
    WhisperAcousticEncoder,
)

pytest.importorskip("transformers")


def build(folder):
    torch.manual_seed(0)
    return SpeechTranslationModel(
        WhisperAcousticEncoder(folder, 16, trained_layers=1),
        TextEncoder(16, 2, 1, dropout=0.0),
        TranslationDecoder(8, 16, 2, 1, dropout=0.0, tie_embedding=True),
        source_vocab=6,
        contrast=False,
        tie_ctc=True,
    )


def loss_of(model, rows):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6400, generator=generator)
    tokens = torch.randint(1, 6, (4, 3), generator=generator)
    out = model(
        tasks=("st", "mt", "asr"),
        x=x[rows],
        lens=torch.tensor([1.0, 0.5, 0.8, 0.3])[rows],
        source=tokens[rows],
        source_lens=torch.ones(len(rows)),
        target_bos=tokens[rows],
    )
    return (out.st + out.mt).logsumexp(-1).mean() + (
        out.speech.logits.square().mean((1, 2)).mean()
    )


def train(rank, folder, port):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{port}",
        rank=rank,
        world_size=2,
    )
    model = torch.nn.parallel.DistributedDataParallel(build(folder).eval())
    # Twice: a second step finds what the first left unfinished.
    for _ in range(2):
        model.zero_grad()
        loss_of(model, [2 * rank, 2 * rank + 1]).backward()
    gradients = {n: p.grad for n, p in model.module.named_parameters()}
    torch.save(gradients, f"{folder}/gradients{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    folder = save_whisper(tmp_path / "whisper", encoder_layers=2)
    torch.multiprocessing.spawn(train, (str(folder), tmp_path / "port"), 2)
    found = [torch.load(folder / f"gradients{rank}.pt") for rank in (0, 1)]
    model = build(folder).eval()
    halves = loss_of(model, [0, 1]), loss_of(model, [2, 3])
    (sum(halves) / 2).backward()
    for name, parameter in model.named_parameters():
        for gradients in found:
            if parameter.grad is None:
                assert gradients[name] is None, name
            else:
                torch.testing.assert_close(
                    gradients[name], parameter.grad, atol=1e-5, rtol=1e-4
                )
    learnt = [
        n for n, p in model.acoustic.named_parameters() if p.grad is not None
    ]
    assert {n.split(".")[2] for n in learnt if ".layers." in n} == {"1"}
