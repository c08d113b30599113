"""`taskarith edit`: a folder of edits, learned one after another."""

from functools import partial
from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    Result,
    extra_lines,
    size,
    steps,
    stored_size,
    table,
    write_weights,
)
from speechbrain_taskarith.vectors.engine.vector_header import (
    kept_extra_in,
    read_vector_header,
)

_EXAMPLES = {
    "learn": """\
  # The first edit starts the sequence: base and rule are kept in the folder
  taskarith edit learn edits german results/german/save \\
      --base results/us/save --rule TIES density=0.5 --scale 0.6
  taskarith edit learn edits greek results/greek/save
""",
    "log": "  taskarith edit log edits\n",
    "export": """\
  taskarith edit export edits -o results/edited/CKPT+all --like results/us/save
""",
    "undo": "  taskarith edit undo edits greek\n",
    "redo": "  taskarith edit redo edits\n",
    "reorder": "  taskarith edit reorder edits greek german\n",
}
_REMEDIES = {
    "Start one with SequentialEditor(base, rule, folder)": "Start one with "
    "`edit learn FOLDER NAME FINETUNED --base BASE --rule RULE`",
    "Close it there (editor.close()), or open it for reading with "
    "SequentialEditor.resume(folder, read_only=True)": "Wait until it is done",
    "undo it first": "undo it first (`edit undo`)",
}


def add_parser(verbs, summary):
    """Add the verb's parser."""
    parser = verbs.add_parser(
        "edit",
        description="Sequential model editing (Kulshreshtha et al. 2024, "
        "arXiv 2406.17935): one folder holds the base, the vector of every "
        "edit and their log; the model is always rebuilt from it, bit for bit.",
        epilog="examples:\n" + "".join(_EXAMPLES.values()),
        formatter_class=shared.argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(
        metavar="ACTION", required=True, dest="action"
    )
    action = partial(_action, actions)
    dry_run = shared.writing(dry_run_only=True)
    _add_learn(action, dry_run)
    undo = action("undo", "take an edit back", undo_edit, dry_run)
    undo.add_argument("name", metavar="NAME")
    action(
        "redo",
        "bring back what was undone since the last edit",
        redo_edit,
        dry_run,
    )
    reorder = action(
        "reorder", "apply the edits in another order", reorder_edits, dry_run
    )
    reorder.add_argument("names", nargs="+", metavar="NAME")
    log = action("log", "show the edits in force", show_log)
    log.add_argument(
        "--history", action="store_true", help="also what was undone"
    )
    log.add_argument(
        "--verify",
        action="store_true",
        help="read everything and compare it with the log",
    )
    export = action(
        "export",
        "write the present model",
        export_model,
        shared.reading("recoverable"),
        shared.writing(),
    )
    export.add_argument(
        "--dtype",
        help="type of the weights, e.g. bfloat16, or base for the base's "
        "types (float32; with --like, base)",
    )
    export.add_argument(
        "--like",
        metavar="FOLDER",
        help="take the other files of this checkpoint along (normaliser, "
        "tokenizer, configuration)",
    )


def _action(actions, name, summary, run, *parents):
    parser = shared.add_verb(
        actions, name, summary, _EXAMPLES[name], run, parents, listed=True
    )
    parser.get_default("remedies").update(_REMEDIES)
    parser.add_argument("folder", metavar="FOLDER", help="the edits' folder")
    return parser


def _add_learn(action, dry_run):
    rule = shared.rule_and_scale(
        "first edit: required, and --scale may be the schedule 1/t; later "
        "edits follow the first unless they say otherwise"
    )
    learn = action(
        "learn",
        "add a share of what fine-tuning on a domain changed",
        learn_domain,
        shared.reading(),
        rule,
        dry_run,
    )
    add = learn.add_argument
    add("name", metavar="NAME", help="name of the domain")
    add(
        "finetuned",
        metavar="FINETUNED",
        help="the model, fine-tuned from the present one (edit export)",
    )
    add("--base", metavar="BASE", help="first edit: what to start from")
    add(
        "--encoding",
        help="first edit: how vectors are stored, see `taskarith vector "
        "--help` (auto: exactly, the smaller of sparse and lossless)",
    )
    add("--selected-on", help="what the scale was chosen on")
    add("--note", default="", help="free text for the log")


def learn_domain(options):
    """Learn a domain."""
    folder, scale = Path(options.folder), _scale(options)
    finetuned = shared.open_weights(options.finetuned, options)
    if options.dry_run:
        with shared.threads(options):
            return _would_learn(options, finetuned, scale)
    starting, existed = _is_new(options), folder.exists()
    progress = steps(2, not options.no_progress)
    with shared.threads(options), progress as step:
        step("opening")
        with _open(options, starting, scale) as editor:
            step("learning")
            try:
                editor.learn(
                    options.name,
                    finetuned,
                    scale=None if starting else scale,
                    selected_on=options.selected_on,
                    note=options.note,
                )
            except BaseException:
                # Only what this process has started: another may have been
                # faster.
                if starting:
                    _remove_start(folder, existed)
                raise
    edit = editor.log[-1]
    stored = (folder / edit.vector).stat().st_size
    line = (
        f"learned {edit.name!r} with scale {edit.scale}; its vector takes "
        f"{size(stored)}; the model is now {edit.state[:12]}"
    )
    from speechbrain_taskarith.vectors import open_state

    history = read_vector_header(open_state(folder / edit.vector))[2]
    kept = kept_extra_in(history)
    data = {"verb": "edit learn", "dry_run": False, **edit.to_dict()}
    return Result([line, *extra_lines(kept)], {**data, "extra_of_base": kept})


def _is_new(options):
    from speechbrain_taskarith.vectors.editing.log import has_log

    new = not has_log(options.folder)
    if new and not (options.base and options.rule):
        raise ValueError(
            f"{options.folder}: holds no sequence of edits yet; the first "
            "one needs --base and --rule (e.g. --rule TIES density=0.5)"
        )
    if not new and options.encoding:
        raise ValueError(
            f"{options.folder}: --encoding was fixed by the first edit"
        )
    return new


def _scale(options):
    """Return `--scale`, which for a new sequence may be a schedule."""
    if options.scale != ["1/t"]:
        return shared.scale_of(options.scale)
    if not _is_new(options):
        raise ValueError(
            f"{options.folder}: --scale 1/t is chosen at the first edit; "
            "leave it out to follow the sequence's, or give a number"
        )
    return "1/t"


def _open(options, starting, scale=None, read_only=False):
    """Start the sequence, or open it for one more edit."""
    from speechbrain_taskarith.vectors import SequentialEditor

    rule = None if options.rule is None else shared.rule_of(options.rule)
    if starting:
        # The first edit's scale and patterns are those of the sequence.
        return SequentialEditor(
            shared.open_weights(options.base, options),
            rule,
            options.folder,
            scale=scale,
            encoding=options.encoding or "auto",
            **shared.patterns(options),
        )
    chosen = {"include": options.include, "exclude": options.exclude}
    editor = SequentialEditor.resume(
        options.folder, rule, read_only=read_only, **chosen
    )
    if options.base and not options.any_base:
        base = shared.open_weights(options.base, options)
        if base.fingerprint != editor.base_fingerprint:
            editor.close()
            raise ValueError(
                f"{options.folder}: starts from "
                f"{editor.base_fingerprint[:12]}, not from {options.base} "
                f"({base.fingerprint[:12]}); use another folder, or leave "
                "--base out"
            )
    return editor


def _remove_start(folder, existed):
    """After a first edit that failed: leave the folder as it was found."""
    import shutil

    from speechbrain_taskarith.vectors.editing.lock import LOCK_NAME
    from speechbrain_taskarith.vectors.editing.log import (
        LAST_NAME,
        LOG_NAME,
        EditLog,
    )

    if not (folder / LOG_NAME).is_file() or EditLog.read(folder).edits:
        return
    names = (LOG_NAME, LAST_NAME, LOCK_NAME, "base.ckpt", "base.safetensors")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for name in ("vectors", "states"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if not existed:
        folder.rmdir()


def _would_learn(options, finetuned, scale):
    """Compute the edit in memory, and write nothing."""
    from speechbrain_taskarith.vectors.editing import folder, precision
    from speechbrain_taskarith.vectors.editing.learning import make_edit
    from speechbrain_taskarith.vectors.rules import from_description

    how = shared.patterns(options)
    rule = shared.rule_of(options.rule) if options.rule else None
    if _is_new(options):
        base = shared.open_weights(options.base, options)
        folder.check_finite(base, base.label, **how)
        before, encoding = precision.widened(base), options.encoding or "auto"
        how |= {"number": 1, "schedule": scale}
        how["types_for"] = partial(precision.types_of, base=base)
    else:
        _open(options, starting=False, read_only=True)
        files = folder.EditFolder.reopen(options.folder, read_only=True)
        log = files.log
        if options.name in [edit.name for edit in log.edits]:
            raise ValueError(
                f"{options.folder}: {options.name!r} was learned already"
            )
        before, encoding = files.present(), log.encoding
        rule = rule or from_description(log.rule)
        how |= {
            "number": len(log.edits) + 1,
            "types_for": files.types,
            "given": log.handed_out(before.fingerprint),
            "schedule": log.schedule,
            "scale": scale,
            "include": options.include or log.include,
            "exclude": options.exclude or log.exclude,
        }
    vector, scale, started_from = make_edit(before, finetuned, rule, **how)
    # Also that the result is finite, as the edit itself would find.
    vector.apply(before, scale)
    vector, encoding = folder.to_store(vector, encoding)
    count, norm = stored_size(vector, encoding), vector.norm()
    line = (
        f"would learn {options.name!r} with scale {scale}: a vector of norm "
        f"{norm:.4g}, {size(count)} {encoding}"
    )
    data = {
        "verb": "edit learn",
        "dry_run": True,
        "name": options.name,
        "scale": scale,
        "rule": rule.describe(),
        "norm": norm,
        "bytes": count,
        "encoding": encoding,
        "started_from": started_from,
        "extra_of_base": kept_extra_in(vector.metadata),
    }
    return Result([line, *extra_lines(data["extra_of_base"])], data)


def undo_edit(options):
    """Take an edit back."""
    names = _names(options)
    if options.name not in names:
        raise KeyError(
            f"{options.folder}: no edit {options.name!r}; there are: "
            f"{', '.join(names) or 'none'}"
        )
    left = [name for name in names if name != options.name]
    what = f"undone {options.name!r}"
    return _change(options, names, left, what, options.name)


def redo_edit(options):
    """Bring an edit back."""
    log = _read_log(options.folder)
    names = [edit.name for edit in log.edits]
    if not log.undone:
        raise ValueError(
            f"{options.folder}: nothing was undone since the last edit"
        )
    index, edit = log.undone[-1]
    back = [*names[:index], edit.name, *names[index:]]
    return _change(options, names, back, f"brought {edit.name!r} back")


def reorder_edits(options):
    """Apply the edits in another order."""
    names = _names(options)
    if sorted(names) != sorted(options.names):
        raise ValueError(
            f"{options.folder}: expected each of {', '.join(names) or 'none'} "
            f"once, got {', '.join(options.names)}; to leave one out use "
            "`edit undo`"
        )
    return _change(options, names, options.names, "reordered", options.names)


def _change(options, before, names, what, *arguments):
    """Undo, redo or re-order, or say what would be left."""
    data = {"verb": f"edit {options.action}", "dry_run": options.dry_run}
    if options.dry_run:
        # What stands behind the first difference.
        same = [b == n for b, n in zip(before, names)]
        approximate = names[[*same, False].index(False) :]
        lines = [f"would leave: {', '.join(names) or 'the base'}"]
        if options.action == "redo":
            approximate = []
        if approximate:
            lines.append(
                "  approximate, since learned on another state: "
                f"{', '.join(approximate)}"
            )
        data |= {"edits": names, "approximate": approximate}
        return Result(lines, data)
    from speechbrain_taskarith.vectors import SequentialEditor

    with steps(2, not options.no_progress) as step:
        step("opening")
        with SequentialEditor.resume(options.folder) as editor:
            step(options.action)
            getattr(editor, options.action)(*arguments)
    described = describe_log(options.folder)
    return Result([what, *shown_log(described)], {**data, **described})


def show_log(options):
    """Show the edits in force, and the history if asked for."""
    described = describe_log(options.folder)
    lines, history = shown_log(described), described.pop("history")
    if options.verify:
        from speechbrain_taskarith.vectors import SequentialEditor

        SequentialEditor.resume(options.folder, read_only=True, verify=True)
        lines.append("verified: base, vectors and every state are as logged")
    data = {"verb": "edit log", "verified": options.verify, **described}
    if options.history:
        data["history"] = history
        for entry in history:
            named = f" {entry['name']}" if "name" in entry else ""
            lines.append(f"  {entry['when']}  {entry['action']}{named}")
    return Result(lines, data)


def export_model(options):
    """Write the present model, with its card."""
    output = shared.check_output(
        options.output, [options.folder], options.overwrite
    )
    if Path(options.folder).resolve() in output.resolve().parents:
        raise ValueError(
            f"{output}: lies among the files of the edits; name an output "
            "outside"
        )
    if options.like and Path(options.like).is_file():
        raise ValueError(
            f"--like {options.like}: is a file; expected the folder of a "
            "checkpoint, whose other files are taken along"
        )
    from speechbrain_taskarith.vectors import (
        ModelCard,
        SequentialEditor,
        as_state,
    )

    dtype = options.dtype or ("base" if options.like else None)
    with steps(1, not options.no_progress) as step:
        step("reading")
        editor = SequentialEditor.resume(options.folder, read_only=True)
        state = as_state(editor.state(dtype))
        rounded = state.fingerprint != editor.fingerprint
        if rounded and not options.dry_run:
            # That it is given away so is logged, for the next edit.
            with SequentialEditor.resume(options.folder) as editor:
                state = as_state(editor.state(dtype))
        card = ModelCard.of_edits(editor)
    result = write_weights(
        state,
        output,
        card,
        like=options.like,
        recoverable=options.recoverable,
        dry_run=options.dry_run,
    )
    edits = [edit.name for edit in editor.log]
    result.data = {"verb": "edit export", **result.data, "edits": edits}
    return result


def _read_log(folder):
    from speechbrain_taskarith.vectors.editing.log import EditLog

    return EditLog.read(folder)


def _names(options):
    return [edit.name for edit in _read_log(options.folder).edits]


def describe_log(folder):
    """Return a folder's log in plain types; needs no torch."""
    log = _read_log(folder)
    edits = [edit.to_dict() for edit in log.edits]
    for edit in edits:
        file = Path(folder) / edit["vector"]
        edit["bytes"] = file.stat().st_size if file.is_file() else None
    return {
        "base": log.base,
        "rule": log.rule,
        "encoding": log.encoding,
        "edits": edits,
        "history": log.history,
    }


def shown_log(described):
    """Return a log as lines of text: the base, then a table."""
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
