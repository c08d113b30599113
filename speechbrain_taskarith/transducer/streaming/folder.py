"""A recogniser's folder: its description and its weights."""

from pathlib import Path

from speechbrain_taskarith.utils.model_folder.description import (
    DESCRIPTION,
    read_description,
)
from speechbrain_taskarith.utils.model_folder.weights import load_weights

KEY = "transcriber"
WEIGHTS = ("transcriber.ckpt", "transcriber.safetensors")

_REMEDY = (
    "save the recogniser's weights there: "
    "torch.save(transcriber.state_dict(), ...)"
)


def load_transcriber(folder, device="cpu"):
    """Make a recogniser of a folder, in evaluation mode.

    `hyperparams.yaml` makes it, under the key `transcriber`; a key
    `model_folder: !PLACEHOLDER` becomes the folder itself; `transcriber.ckpt`
    is its state dict.
    """
    path = Path(folder) / DESCRIPTION
    found = read_description(folder, needs=f" and {WEIGHTS[0]}")
    if KEY not in found:
        raise ValueError(f"{path}: no key {KEY!r}; it names the recogniser")
    transcriber = found[KEY]
    if not callable(getattr(transcriber, "stream", None)):
        raise ValueError(
            f"{path}: {KEY!r} is a {type(transcriber).__name__}; expected a "
            "speechbrain_taskarith.transducer.StreamingTransducer"
        )
    load_weights(transcriber, folder, WEIGHTS, _REMEDY)
    return transcriber.to(device).eval()
