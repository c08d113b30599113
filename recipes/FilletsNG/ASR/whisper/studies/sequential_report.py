"""Tables, logs and the plot of sequential.py."""

from statistics import fmean

from speechbrain_taskarith.metrics import (
    LifelongMatrix,
    Summary,
    WERReport,
    paired_bootstrap,
    plots,
    write_cl_masr_log,
)
from studies.sequential_rows import RIVALS, ROWS

TABLE = "sequential_editing"
TITLE = "Sequential editing of Whisper"
BASELINE = "fine_tuning"


def matrix_of(found, domains):
    """Make the matrix of what was measured: `{(after, on): WERReport}`."""
    matrix = LifelongMatrix(domains)
    for (after, on), report in found.items():
        matrix.record(after, on, report.wer)
    return matrix


def write_report(results, folder, original):
    """Write summary, tables, matrices, logs and plot.

    `results`: `{(seed, order, row): {(after, on): WERReport}}`.
    """
    matrices = {
        key: matrix_of(found, [original, *key[1]])
        for key, found in results.items()
    }
    seeds = list(dict.fromkeys(seed for seed, _, _ in results))
    orders = list(dict.fromkeys(order for _, order, _ in results))
    summary = Summary(folder, title=TITLE)
    for note in notes(orders, original):
        summary.note(note)
    for seed in seeds:
        for row in ROWS:
            # A row that is still going is left out.
            if all((seed, order, row) in matrices for order in orders):
                add_row(summary, matrices, seed, orders, row)
    for key, matrix in matrices.items():
        seed, order, row = key
        place = folder / "matrices" / "_".join(order) / str(seed)
        matrix.save(place / f"{row}.csv")
        if not ROWS[row].only_last:
            write_cl_masr_log(
                matrix, folder / "cl_masr_logs" / "_".join(order), row, seed
            )
    add_bootstrap(summary, results)
    plot_averages(matrices, orders, folder / "plots" / f"{TABLE}.png")
    summary.write()
    summary.print()
    return summary


def notes(orders, original):
    """Say what the tables show."""
    old = [name for name, row in ROWS.items() if row.uses_old_data]
    yield (
        f"The base knows {original}; then it learns, in each of these orders, "
        f"{'; '.join(' > '.join(order) for order in orders)}. Average WER over "
        f"{original} and all domains at the end, BWT (mean change of earlier "
        "ones, negative: forgetting), WERR (relative reduction of the average "
        f"WER against `{BASELINE}`): means over the orders."
    )
    yield (
        f"Train on lines of earlier domains, {original} among them: "
        f"{', '.join(f'`{name}`' for name in old)}. Rivals: "
        f"{', '.join(f'`{name}`' for name in RIVALS)}."
    )


def add_row(summary, matrices, seed, orders, row):
    """Add a row of one seed: means over the orders, and each order."""
    own = [matrices[seed, order, row] for order in orders]
    selected = ROWS[row].knob or ROWS[row].chooses
    common = {
        "row": row,
        "seed": seed,
        "selected_on": "valid" if selected else None,
    }
    found = [
        matrix.measures(matrices.get((seed, order, BASELINE)))
        for order, matrix in zip(orders, own)
    ]
    for metric in found[0]:
        each = [values.get(metric) for values in found]
        if None not in each:
            summary.add(table=TABLE, metric=metric, value=fmean(each), **common)
    for domain in sorted(own[0].domains):
        summary.add(
            table="by_domain",
            metric=domain,
            value=fmean(m[m.domains[-1], domain] for m in own),
            unit="%",
            **common,
        )
    for order, matrix in zip(orders, own):
        summary.add(
            table="by_order",
            metric="_".join(order),
            value=matrix.average_wer(),
            unit="%",
            **common,
        )


def pooled(results, row):
    """Return what a row got wrong at the end: `({utterance: report}, blocks)`.

    An utterance counts once for each order and seed, all in one block.
    """
    found = {
        (seed, order, on, u.id): u
        for (seed, order, name), cells in results.items()
        if name == row
        for (after, on), report in cells.items()
        if after == order[-1]
        for u in report.utterances
    }
    return found


def add_bootstrap(summary, results):
    """Compare each row with fine-tuning, over the test utterances."""
    baseline = pooled(results, BASELINE)
    for row in ROWS:
        own = pooled(results, row)
        both = [key for key in own if key in baseline]
        if row == BASELINE or not both:
            continue
        first, second = (
            WERReport(tuple(found[key] for key in both))
            for found in (baseline, own)
        )
        test = paired_bootstrap(
            first, second, blocks=[(on, name) for _, _, on, name in both]
        )
        summary.add_paired_test("against_fine_tuning", row, test)


def plot_averages(matrices, orders, path):
    """Draw the average WER after each domain, for a few rows."""
    curves = {}
    for row in ROWS:
        own = [m for (_, _, name), m in matrices.items() if name == row]
        if own and not ROWS[row].only_last:
            steps = range(len(own[0].domains))
            curves[row] = [
                fmean(m.average_wer(at=m.domains[k]) for m in own)
                for k in steps
            ]
    if not curves:
        return
    old = {row for row in curves if ROWS[row].uses_old_data}
    no_edit = {BASELINE, *RIVALS, *old}
    groups = [
        [BASELINE],
        [row for row in curves if row in RIVALS and row not in old],
        [row for row in curves if row not in no_edit],
        list(old),
    ]
    shown = [
        min(
            (row for row in group if row in curves), key=lambda r: curves[r][-1]
        )
        for group in groups
        if any(row in curves for row in group)
    ]
    with plots.figure(path) as axes:
        for number, row in enumerate(shown):
            steps = range(len(curves[row]))
            label = plots.words(row)
            colour = number - 1 if row != BASELINE else None
            plots.draw_line(axes, steps, curves[row], colour, label)
        axes.set_xticks(range(len(orders[0]) + 1))
        axes.set_xlabel("domains learned")
        axes.set_ylabel("average WER (%)")
        plots.legend_below(axes)
    plot_effect(matrices, shown, path.with_name(f"{TABLE}_by_domain.png"))


def plot_effect(matrices, rows, path):
    """Draw the WER on each domain at the end, for the same rows.

    Means over the orders; error bars over the seeds.
    """
    seeds = list(dict.fromkeys(seed for seed, _, _ in matrices))
    domains = next(iter(matrices.values())).domains
    effect = {}
    for domain in domains:
        for row in rows:
            each = [
                [
                    m[m.domains[-1], domain]
                    for (s, _, name), m in matrices.items()
                    if name == row and s == seed
                ]
                for seed in seeds
            ]
            effect.setdefault(domain, {})[row] = [fmean(e) for e in each if e]
    plots.plot_before_after(
        effect, path, title="WER on each domain after the last one"
    )
