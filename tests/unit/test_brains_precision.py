"""Which precision a device trains fast in."""

import pytest
import torch

from speechbrain_taskarith.brains import fast_precision


def capabilities(monkeypatch, **found):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: found, raising=False
    )


@pytest.mark.parametrize(
    "found, expected",
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_f": True, "avx512_bf16": False}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_a_cpu_by_its_instructions(monkeypatch, found, expected):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    capabilities(monkeypatch, architecture="x86_64", **found)
    assert fast_precision("cpu") == expected
    assert fast_precision(torch.device("cpu")) == expected


@pytest.mark.parametrize("missing", ["the question", "oneDNN"])
def test_without_an_answer_it_is_float32(monkeypatch, missing):
    """Other processors are asked by a private name, which may go."""
    capabilities(monkeypatch, architecture="aarch64")
    if missing == "oneDNN":
        monkeypatch.setattr(
            torch.backends.mkldnn, "is_available", lambda: False
        )
    else:

        class Gone:
            pass

        monkeypatch.setattr(torch.ops, "mkldnn", Gone(), raising=False)
    assert fast_precision("cpu") == "fp32"


def test_a_version_without_the_public_name(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for answer, expected in ((True, "bf16"), (False, "fp32")):

        class Operators:
            _is_mkldnn_bf16_supported = staticmethod(lambda a=answer: a)

        monkeypatch.setattr(torch.ops, "mkldnn", Operators, raising=False)
        assert fast_precision("cpu") == expected


def test_none_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fast_precision() == fast_precision("cpu")
    # A GPU that is not there is SpeechBrain's error to raise, not ours.
    assert fast_precision("cuda:0") == "fp32"


def test_other_devices_train_in_float32():
    assert fast_precision("meta") == "fp32"


def test_the_autocast_that_it_names_works():
    precision = fast_precision("cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    layer, x = torch.nn.Linear(8, 8), torch.rand(4, 8)
    enabled = precision == "bf16"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        assert layer(x).dtype == dtype
