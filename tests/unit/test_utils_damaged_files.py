"""Every reader of torch files: whatever the unpickler trips over, one error.

`vectors` has its own tests; these are the rooms that may not import it.
"""

import pytest
import torch

# A counter's text, and what makes torch's unpickler raise IndexError,
# EOFError, struct.error, KeyError and UnicodeDecodeError.
CONTENT = [b"2", b".", b"(", b"G", b"h\n", b"c\xb5\xfe"]


def of_transfer(path):
    from speechbrain_taskarith.transducer import transfer_encoder

    transfer_encoder(path, torch.nn.Linear(1, 1))


def of_translation(path):
    from speechbrain_taskarith.translation.text.initialise import (
        initialise_from_text_translation,
    )

    initialise_from_text_translation(torch.nn.Linear(1, 1), path)


def of_transcribe(path):
    from speechbrain_taskarith.utils.model_folder.weights import load_weights

    load_weights(torch.nn.Linear(1, 1), path.parent, [path.name], "save it")


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("read", [of_transfer, of_translation, of_transcribe])
def test_one_error_that_names_the_file(tmp_path, read, content):
    path = tmp_path / "transcriber.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="transcriber.ckpt") as caught:
        read(path)
    assert type(caught.value) is ValueError
