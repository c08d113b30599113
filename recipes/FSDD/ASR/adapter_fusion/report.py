"""Tables and heat maps of the study."""

import torch
from common.study import relative_reduction

from speechbrain_taskarith.metrics import Summary
from speechbrain_taskarith.metrics.plots import plot_heat_map, words

TABLE = "adapter_fusion"
BY_TASK = "adapter_fusion_by_task"
ZERO_SHOT = "adapter_fusion_zero_shot"
TITLE = "Audio-AdapterFusion on strings of digits"
NOTE = (
    "`wer`: mean over the tasks; `relative_reduction`: of that mean, against "
    "`full_fine_tuning`. `trained_parameters`: all that a row adds to the base "
    "or changes in it; `share`: the same in % of the base. `seconds`: of "
    "training, with the adapters'. `routing` and `full_fine_tuning_each` know "
    "the task of every utterance, no other row does."
)
ZERO_NOTE = (
    "`adapter_fusion_zero_shot`: the WER of each task with adapters, a "
    "combination or fine-tuning that have not seen it. `relative_reduction` "
    "is against `base`."
)


def write_report(results, output, hparams):
    """Write and print the tables of one seed, and its plots.

    `results`: `rows` and `zero_shot` (`{name: Row}`), `parameters` of the base,
    `bytes` of an adapter's file, and `unharmed`: whether a fifth adapter left
    the first four as they were.
    """
    if hparams["report_on"] != "test":
        output = output / hparams["report_on"]
    summary = Summary(output, title=TITLE)
    summary.note(NOTE)
    summary.note(ZERO_NOTE)
    rows, held = results["rows"], results["zero_shot"]
    common = {"split": hparams["report_on"], "seed": hparams["seed"]}
    reference = rows["full_fine_tuning"].mean
    for name, row in rows.items():
        values = {
            "wer": (row.mean, "%"),
            "relative_reduction": (
                relative_reduction(before=reference, after=row.mean),
                "%",
            ),
            "trained_parameters": (row.trained, "parameters"),
            "share": (100 * row.trained / results["parameters"], "%"),
            "seconds": (row.seconds, "s"),
        }
        for metric, (value, unit) in values.items():
            summary.add(
                table=TABLE,
                row=name,
                metric=metric,
                value=value,
                unit=unit,
                **common,
            )
        for task, wer in row.wer.items():
            summary.add(
                table=BY_TASK,
                row=name,
                metric=f"wer_{task}",
                value=wer,
                unit="%",
                **common,
            )
        if row.attention:
            plot_row(name, row.attention, output)
    base = rows["base"].mean
    for name, row in {"base": rows["base"], **held}.items():
        values = {
            "wer": row.mean,
            "relative_reduction": relative_reduction(
                before=base, after=row.mean
            ),
            **{f"wer_{t}": wer for t, wer in row.wer.items()},
        }
        for metric, value in values.items():
            summary.add(
                table=ZERO_SHOT,
                row=name,
                metric=metric,
                value=value,
                unit="%",
                **common,
            )
    if not results["unharmed"]:
        raise RuntimeError(
            "a fifth adapter has changed the scores through the first four"
        )
    summary.note(
        "With a fifth, trained adapter (`shared_adapter`) the scores through "
        "the first four are the same bytes as before. One adapter's file has "
        f"{results['bytes']} bytes."
    )
    summary.write()
    summary.print()


def plot_row(name, attention, output):
    """Plot where the attention of a fusion goes."""
    attention = {task: torch.tensor(a) for task, a in attention.items()}
    tasks = list(attention)
    own = [attention[t][:, n] for n, t in enumerate(tasks)]
    plot_heat_map(
        torch.stack(own),
        tasks,
        [str(n) for n in range(len(own[0]))],
        output / "plots" / f"attention_by_layer_{name}.png",
        title=f"{words(name)}: attention to the task's own adapter",
        xlabel="encoder layer",
        ylabel="spoken",
        limits=(0.0, 1.0),
        form="{:.2f}",
        unit="attention",
    )
    plot_heat_map(
        torch.stack([attention[t].mean(0) for t in tasks]),
        tasks,
        tasks,
        output / "plots" / f"attention_by_task_{name}.png",
        title=f"{words(name)}: attention, mean over layers",
        xlabel="adapter",
        ylabel="spoken",
        limits=(0.0, 1.0),
        form="{:.2f}",
        unit="attention",
    )
