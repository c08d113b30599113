"""What `taskarith edit` does with edits that are there already.

Undo, re-order, show, export; learning is in `edit`.
"""

from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import Result, size, steps, table
from speechbrain_taskarith.commands.output import write_weights, written


def undo_edit(options):
    """Take an edit back.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        The edits left.
    """
    names = _names(options)
    if options.name not in names:
        raise KeyError(
            f"{options.folder}: no edit {options.name!r}; there are: "
            f"{', '.join(names) or 'none'}"
        )
    left = [name for name in names if name != options.name]
    return _change(
        options,
        names,
        left,
        f"undone {options.name!r}",
        lambda editor: editor.undo(options.name),
    )


def reorder_edits(options):
    """Apply the edits in another order.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        The edits in their new order.
    """
    names = _names(options)
    if sorted(names) != sorted(options.names):
        raise ValueError(
            f"{options.folder}: expected each of {', '.join(names) or 'none'} "
            f"once, got {', '.join(options.names)}; to leave one out use "
            "`edit undo`"
        )
    return _change(
        options,
        names,
        list(options.names),
        "reordered",
        lambda editor: editor.reorder(options.names),
    )


def _names(options):
    return [edit.name for edit in read_log(options.folder).edits]


def _change(options, before, names, what, act):
    """Undo or re-order, or say what it would come to."""
    data = {"verb": f"edit {options.action}", "dry_run": options.dry_run}
    if options.dry_run:
        approximate = [
            name
            for i, name in enumerate(names)
            if before[: i + 1] != names[: i + 1]
        ]
        lines = [f"would leave: {', '.join(names) or 'the base'}"]
        if approximate:
            lines.append(
                "  approximate, since learned on another state: "
                f"{', '.join(approximate)}"
            )
        return Result(
            lines, {**data, "edits": names, "approximate": approximate}
        )
    from speechbrain_taskarith.vectors import SequentialEditor

    with steps(2, not options.no_progress) as step:
        step("opening")
        with SequentialEditor.resume(options.folder) as editor:
            step(options.action)
            act(editor)
    described = describe_log(options.folder)
    return Result([what, *shown_log(described)], {**data, **described})


def show_log(options):
    """Show the log.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        Edits, and history if asked for.
    """
    described = describe_log(options.folder)
    lines = shown_log(described)
    if options.verify:
        from speechbrain_taskarith.vectors import SequentialEditor

        SequentialEditor.resume(options.folder, read_only=True)
        lines.append("verified: base, vectors and every state are as logged")
    if options.history:
        for entry in described["history"]:
            named = f" {entry['name']}" if "name" in entry else ""
            lines.append(f"  {entry['when']}  {entry['action']}{named}")
    else:
        del described["history"]
    return Result(
        lines, {"verb": "edit log", "verified": options.verify, **described}
    )


def export_it(options):
    """Write the present model, with its card.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        What was written.
    """
    output = shared.check_output(
        options.output, [options.folder], options.overwrite
    )
    from speechbrain_taskarith.vectors import (
        ModelCard,
        SequentialEditor,
        as_state,
    )

    with steps(1, not options.no_progress) as step:
        step("rebuilding")
        editor = SequentialEditor.resume(options.folder, read_only=True)
        state = editor.state()
    if options.dry_run:
        result = written(output, as_state(state), dry_run=True)
    else:
        result = write_weights(
            state,
            output,
            ModelCard.of_edits(editor),
            like=options.like,
            recoverable=options.recoverable,
        )
    edits = [edit.name for edit in editor.log]
    result.data = {"verb": "edit export", **result.data, "edits": edits}
    return result


def read_log(folder):
    """Read a folder's log; needs no torch.

    Arguments
    ---------
    folder : str or pathlib.Path
        The edits' folder.

    Returns
    -------
    EditLog
        Its content.
    """
    from speechbrain_taskarith.vectors.editing.log import EditLog

    return EditLog.read(folder)


def describe_log(folder):
    """Return a folder's log in plain types; needs no torch.

    Arguments
    ---------
    folder : str or pathlib.Path
        The edits' folder.

    Returns
    -------
    dict
        `base`, `rule`, `encoding`, `edits`, `history`.
    """
    log = read_log(folder)
    edits = []
    for edit in log.edits:
        file = Path(folder) / edit.vector
        count = file.stat().st_size if file.is_file() else None
        edits.append({**edit.to_dict(), "bytes": count})
    return {
        "base": log.base,
        "rule": log.rule,
        "encoding": log.encoding,
        "edits": edits,
        "history": log.history,
    }


def shown_log(described):
    """Return a log as lines of text.

    Arguments
    ---------
    described : dict
        From `describe_log`.

    Returns
    -------
    list of str
        The base, then a table.
    """
    lines = [
        f"base {described['base']['fingerprint'][:12]} "
        f"(from {described['base'].get('from', 'unknown')})"
    ]
    rows = [
        (
            number,
            edit["name"],
            edit["scale"],
            edit["rule"].get("rule"),
            "missing" if edit["bytes"] is None else size(edit["bytes"]),
            "exact" if edit["exact"] else "approximate",
            edit["state"][:12],
            edit["when"],
        )
        for number, edit in enumerate(described["edits"], 1)
    ]
    header = ("#", "name", "scale", "rule", "vector", "edit", "model", "when")
    return lines + (table(rows, header) if rows else ["no edits"])
