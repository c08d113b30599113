"""What a run of the recipe leaves behind: tables, plots, and the undo proof."""

import shutil
import tempfile
from pathlib import Path

from common.study import add_paired_tests
from speechbrain.utils.logger import get_logger

from speechbrain_taskarith.metrics import (
    LifelongMatrix,
    Summary,
    write_cl_masr_log,
)
from speechbrain_taskarith.metrics.plots import words
from speechbrain_taskarith.vectors import (
    SequentialEditor,
    as_state,
    cosine_matrix,
    open_state,
    plot_cosine_matrix,
)

logger = get_logger(__name__)

TABLE = "sequential_editing"
TITLE = "Sequential editing of a speech recogniser"
BASELINE = "fine_tuning"


# The edits, and what they have to be ahead of: the rivals that keep no old
# data. The mean of the weights before and after is one of these: it is older
# than the edits, and has nothing to choose.
EDITS = ("task_arithmetic", "ties", "chosen_scale_new", "chosen_scale")
RIVALS = (
    *("fine_tuning", "fine_tuning_same_lr", "encoder_only", "ewc", "lwf"),
    *("averaging_half", "averaging_one_over_t"),
)
# What each edit is tested against, on the same utterances.
AGAINST = ("fine_tuning", "ewc", "averaging_half", "averaging_one_over_t")
PAIRED = (*AGAINST, *EDITS)


def with_earlier_rows(matrices, output, hparams):
    """Add rows that earlier runs with another `--only` left, in table order."""
    if hparams["report_on"] != "test":
        output = output / hparams["report_on"]
    matrices = {**earlier_rows(output, hparams), **matrices}
    return {n: matrices[n] for n in hparams["rows"] if n in matrices}


def write_report(matrices, reports, output, hparams):
    """Write summary, tables, plots and logs of one seed, and show the table.

    `reports` are the errors at the end, of the rows of `PAIRED`.
    """
    save = output / "save"
    if hparams["report_on"] != "test":
        output = output / hparams["report_on"]
    summary = Summary(output, title=TITLE)
    run = {"split": hparams["report_on"], "seed": hparams["seed"]}
    summary.note(
        "Average WER over all domains at the end of the sequence "
        f"{' > '.join(hparams['domains'])}; BWT: mean change of earlier "
        "domains (negative: forgetting); WERR: relative reduction of the "
        f"average WER against `{BASELINE}`."
    )
    summary.note(verdict(matrices, hparams))
    for name, matrix in matrices.items():
        choose_on = hparams["rows"][name].get("choose_on")
        common = {
            "table": TABLE,
            "row": name,
            **run,
            "selected_on": choose_on and f"valid_{choose_on}",
        }
        measures = matrix.measures(matrices.get(BASELINE))
        for metric, value in measures.items():
            summary.add(metric=metric, value=value, **common)
        matrix.save(output / "matrices" / f"{name}.csv")
        matrix.plot(
            output / "plots" / f"wer_matrix_{name}.png",
            title=f"WER after each domain: {words(name)}",
        )
        write_cl_masr_log(
            matrix, output / "cl_masr_logs", name, seed=hparams["seed"]
        )
    for name in matrices:
        if hparams["rows"][name].get("rule") is not None:
            folder = save / name
            plot_cosines(folder / "editor", output / "plots", name)
            summary.note(undo_last(folder, name))
    pairs = [(rival, edit) for edit in EDITS for rival in AGAINST]
    add_paired_tests(summary, TABLE, reports, pairs, **run)
    summary.write()
    summary.print(only=[TABLE])


def verdict(matrices, hparams):
    """Say which rival without old data is the strongest, and who is ahead."""
    wers = {name: matrix.average_wer() for name, matrix in matrices.items()}
    rivals = [name for name in RIVALS if name in wers]
    edits = [name for name in EDITS if name in wers]
    if not rivals or not edits:
        return "No edit and rival to compare."
    best = min(rivals, key=wers.get)
    behind = [name for name in edits if wers[name] >= wers[best]]
    shown = ", ".join(f"`{name}` {wers[name]:.1f} %" for name in edits)
    return (
        f"Seed {hparams['seed']}: the strongest rival that keeps no old data "
        f"is `{best}`, {wers[best]:.1f} %; the edits have {shown}. Not ahead "
        f"of it: {', '.join(f'`{name}`' for name in behind) or 'none'}. "
        "(`averaging_half`, `averaging_one_over_t`: the plain mean of the "
        "weights before and after, a rival. `chosen_scale` keeps development "
        "recordings of the domains before.)"
    )


def earlier_rows(output, hparams):
    """Read the rows that runs with another `--only` left in this folder."""
    files = {n: output / "matrices" / f"{n}.csv" for n in hparams["rows"]}
    return {
        name: LifelongMatrix.load(path)
        for name, path in files.items()
        if path.exists()
    }


def plot_cosines(folder, plots, name):
    """Plot the cosines between the vectors of one sequence of edits."""
    editor = SequentialEditor.resume(folder, read_only=True, verify=False)
    names = [edit.name for edit in editor.log]
    if len(names) < 2:
        return
    matrix = cosine_matrix([editor.vector(domain) for domain in names])
    plot_cosine_matrix(
        matrix,
        names,
        plots / f"cosines_{name}.png",
        title=f"Cosines of the vectors as applied: {words(name)}",
    )


def undo_last(folder, row):
    """Drop the last domain in a copy of the editor; compare every byte.

    `folder` is the row's: the editor, and the weights kept after each domain.
    Returns a sentence for the results page; RuntimeError where they differ.
    """
    # A fingerprint is over names, types, shapes and all bytes.
    before = [folder.parent / "first_model" / "kept.safetensors"]
    before += sorted(folder.glob("*/kept.safetensors"))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        copy = Path(place) / "editor"
        shutil.copytree(folder / "editor", copy)
        with SequentialEditor.resume(copy) as editor:
            dropped = editor.undo(editor.log[-1].name)
            undone = as_state(editor.state()).fingerprint
    same = undone == open_state(before[-2]).fingerprint
    if not same:
        raise RuntimeError(
            f"{row}: dropping {dropped.name!r} did not give back the weights "
            "before it"
        )
    return (
        f"Undo, `{row}`: dropping the last domain (`{dropped.name}`) gives "
        "back the weights before it, bit for bit."
    )
