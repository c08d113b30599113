"""What shrinking is for: how much a window of speech tells, and one of text."""

import torch
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_taskarith.brains.ctc import bare
from speechbrain_taskarith.translation import window_entropy


@torch.no_grad()
def representation_entropy(brain, data, hparams):
    """Measure the entropy of windows of speech and of text, in one batch.

    Arguments
    ---------
    brain : TranslationBrain
        After the test: with its best weights.
    data : DynamicItemDataset
        So many as `entropy_utterances` says are taken, of every length.
    hparams : dict
        Of the row.

    Returns
    -------
    dict of str: dict of int: float
        `{representation: {vectors in a window: nats}}`: the acoustic
        encoder's `frames`; with shrinking, what is `shrunk`; `text` where
        the row learns from it. Empty where the row translates no speech.
    """
    if hparams["main"] != "st":
        return {}
    # Sorted by length: every so many.
    step = -(-len(data) // hparams["entropy_utterances"])
    taken = [data[i] for i in range(0, len(data), step)]
    batch = PaddedBatch(taken).to(brain.device)
    model = bare(brain.modules.model).eval()
    x, lens = brain.features(batch)
    speech = model.encode_speech(x, lens, batch.id)
    found = {"frames": (model.acoustic(x, lens), speech.frame_lens)}
    if model.shrink is not None:
        found["shrunk"] = (speech.embedded, speech.lens)
    if "mt" in hparams["tasks"]:
        text = model.encode_text(*batch.source)
        found["text"] = (text.embedded, text.lens)
    windows = hparams["entropy_windows"]
    return {
        name: window_entropy(vectors.float(), lens, windows)
        for name, (vectors, lens) in found.items()
    }
