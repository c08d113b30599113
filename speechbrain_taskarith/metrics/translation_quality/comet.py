"""COMET, by the package of its authors, which is optional."""

from pathlib import Path

from speechbrain_taskarith.metrics.translation_quality.scores import checked
from speechbrain_taskarith.utils.hub.download import is_hub_name
from speechbrain_taskarith.utils.optional import require


def comet_score(
    sources,
    hypotheses,
    references,
    model="Unbabel/wmt22-comet-da",
    batch_size=16,
    gpus=0,
):
    """Score translations by a COMET model.

    Its package reads a checkpoint by unpickling, which can execute code: take
    models from those you trust.

    Arguments
    ---------
    sources : sequence of str
        Transcripts of the speech.
    hypotheses, references : sequence of str
        Translations of each, written and wanted.
    model : str or pathlib.Path
        A checkpoint (`.../checkpoints/model.ckpt`), or a name on Hugging
        Face's hub, which is downloaded (2 GB). Name it beside the figure.
    batch_size, gpus : int
        Sentences at a time; GPUs to use.

    Returns
    -------
    float
        Of the corpus: the mean over sentences.
    list of float
        Of each sentence.

    Raises
    ------
    ImportError
        Without the package, naming the extra to install.
    FileNotFoundError
        No such checkpoint, or no network for a hub name.
    ValueError
        Numbers of sentences that differ, or none.

    Example
    -------
    >>> comet_score(["dog"], ["chien"], ["chien"])  # doctest: +SKIP
    (0.97, [0.97])
    """
    comet = require("comet", "comet", "COMET")
    (references,), hypotheses = checked(list(references), hypotheses)
    (sources,), _ = checked(list(sources), hypotheses)
    loaded = comet.load_from_checkpoint(_checkpoint(comet, model))
    rows = [
        {"src": source, "mt": hypothesis, "ref": reference}
        for source, hypothesis, reference in zip(
            sources, hypotheses, references
        )
    ]
    found = loaded.predict(rows, batch_size=batch_size, gpus=gpus)
    return float(found.system_score), [float(score) for score in found.scores]


def _checkpoint(comet, model):
    remedy = (
        "give the path of a COMET checkpoint (model.ckpt), or where there is a "
        "network a hub name such as Unbabel/wmt22-comet-da"
    )
    if Path(model).is_file():
        return str(model)
    if not is_hub_name(model):
        raise FileNotFoundError(f"{model}: no such checkpoint; {remedy}")
    try:
        return comet.download_model(str(model))
    # Unknown, offline, not allowed: each has its own class.
    except (OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{model}: no COMET model of this name can be had ({reason}); "
            f"{remedy}"
        ) from error
