"""`taskarith edit`: a folder of edits, learned one after another."""

from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import Result, size, steps
from speechbrain_taskarith.commands.edit_folder import (
    export_it,
    read_log,
    reorder_edits,
    show_log,
    undo_edit,
)
from speechbrain_taskarith.commands.rule_text import from_words

_EXAMPLES = """\
  # The first edit starts the sequence: base and rule are kept in the folder
  taskarith edit learn edits german results/german/save \\
      --base results/us/save --rule TIES density=0.5 --scale 0.6
  taskarith edit learn edits greek results/greek/save
  taskarith edit log edits
  taskarith edit export edits -o results/edited/CKPT+all --like results/us/save
  taskarith edit undo edits greek
  taskarith edit reorder edits greek german
"""

# What Python's remedies are called here.
_WORDS = {
    "Start one with SequentialEditor(base, rule, folder)": "Start one with "
    "`edit learn FOLDER NAME FINETUNED --base BASE --rule RULE`",
    "Close it there (editor.close()), or open it for reading with "
    "SequentialEditor.resume(folder, read_only=True)": "Wait until it is done",
    "undo it first": "undo it first (`edit undo`)",
    "use undo(name)": "use `edit undo`",
}


def add_parser(verbs):
    """Add the verb's parser.

    Arguments
    ---------
    verbs : argparse subparsers
        Where to.
    """
    parser = verbs.add_parser(
        "edit",
        help="A folder of edits: learn, undo, reorder, log, export.",
        description="Sequential model editing (Kulshreshtha et al. 2024): one "
        "folder holds the base, the vector of every edit and their log; the "
        "model is always rebuilt from it, bit for bit.",
        epilog=f"examples:\n{_EXAMPLES}",
        formatter_class=shared.argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(
        metavar="ACTION", required=True, dest="action"
    )
    _add_learn(actions)
    undo = _action(actions, "undo", "Take an edit back.", undo_edit)
    undo.add_argument("name", metavar="NAME")
    shared.add_dry_run(undo)
    reorder = _action(
        actions, "reorder", "Apply the edits in another order.", reorder_edits
    )
    reorder.add_argument("names", nargs="+", metavar="NAME")
    shared.add_dry_run(reorder)
    log = _action(actions, "log", "Show the edits in force.", show_log)
    log.add_argument(
        "--history", action="store_true", help="also what was undone"
    )
    log.add_argument(
        "--verify",
        action="store_true",
        help="read everything and compare it with the log",
    )
    export = _action(actions, "export", "Write the present model.", export_it)
    shared.add_writing(export)
    shared.add_recoverable(export)
    export.add_argument(
        "--like",
        metavar="FOLDER",
        help="take the other files of this checkpoint along (normaliser, "
        "tokenizer, configuration)",
    )


def _action(actions, name, summary, run):
    mine = [
        "  " + part.strip().replace("\\\n", "\\\n    ")
        for part in _EXAMPLES.replace("\\\n", "\0").splitlines()
        if f" edit {name} " in part
    ]
    examples = "\n".join(mine).replace("\0", "\\\n   ") + "\n"
    parser = shared.add_verb(actions, name, summary, examples, run)
    parser.set_defaults(words=_WORDS)
    parser.add_argument("folder", metavar="FOLDER", help="the edits' folder")
    return parser


def _add_learn(actions):
    learn = _action(
        actions,
        "learn",
        "Edit: add a share of what fine-tuning on a domain changed.",
        learn_domain,
    )
    learn.add_argument("name", metavar="NAME", help="of the domain")
    learn.add_argument(
        "finetuned",
        metavar="FINETUNED",
        help="the model, fine-tuned from the present one (edit export)",
    )
    learn.add_argument(
        "--base", metavar="BASE", help="first edit: what to start from"
    )
    shared.add_rule(
        learn,
        "first edit: required, and --scale may be the schedule "
        "1/t; later edits follow the first unless they say otherwise",
    )
    learn.add_argument(
        "--encoding",
        help="first edit: how vectors are stored (lossless), see "
        "`taskarith vector --help`",
    )
    learn.add_argument("--selected-on", help="what the scale was chosen on")
    learn.add_argument("--note", default="", help="free text for the log")
    shared.add_recoverable(learn)
    shared.add_dry_run(learn)


def learn_domain(options):
    """Learn a domain.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        The edit.
    """
    folder, scale = Path(options.folder), _scale(options)
    finetuned = shared.open_weights(options.finetuned, options)
    if options.dry_run:
        return _would_learn(options, finetuned, scale)
    starting, existed = _is_new(options), folder.exists()
    editor = None
    try:
        with steps(2, not options.no_progress) as step:
            step("opening")
            editor = _open(options, starting, scale)
            step("learning")
            editor.learn(
                options.name,
                finetuned,
                scale=None if starting else scale,
                selected_on=options.selected_on,
                note=options.note,
            )
        edit = editor.log[-1]
        stored = (folder / edit.vector).stat().st_size
    except BaseException:
        # Only what this process has started: another may have been faster.
        if starting and editor is not None:
            _remove_start(folder, existed)
        raise
    finally:
        if editor is not None:
            editor.close()
    line = (
        f"learned {edit.name!r} with scale {edit.scale}; its vector takes "
        f"{size(stored)}; the model is now {edit.state[:12]}"
    )
    data = {"verb": "edit learn", "dry_run": False, **edit.to_dict()}
    return Result([line], data)


def _is_new(options):
    from speechbrain_taskarith.vectors.editing.log import LOG_NAME

    new = not (Path(options.folder) / LOG_NAME).is_file()
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
    if options.scale == ["1/t"]:
        if not _is_new(options):
            raise ValueError(
                f"{options.folder}: --scale 1/t is chosen at the first edit; "
                "leave it out to follow the sequence's, or give a number"
            )
        return "1/t"
    return shared.scale_of(options.scale)


def _open(options, starting, scale=None, read_only=False):
    from speechbrain_taskarith.vectors import SequentialEditor

    rule = None if options.rule is None else from_words(options.rule)
    if starting:
        base = shared.open_weights(options.base, options)
        # The first edit's scale is that of the whole sequence.
        return SequentialEditor(
            base,
            rule,
            options.folder,
            scale=scale,
            encoding=options.encoding or "lossless",
        )
    editor = SequentialEditor.resume(options.folder, rule, read_only=read_only)
    if options.base:
        from speechbrain_taskarith.vectors.states.fingerprint import short

        base = shared.open_weights(options.base, options)
        if base.fingerprint != editor.base_fingerprint:
            editor.close()
            raise ValueError(
                f"{options.folder}: starts from "
                f"{short(editor.base_fingerprint)}, not from {options.base} "
                f"({short(base.fingerprint)}); use another folder, or leave "
                "--base out"
            )
    return editor


def _remove_start(folder, existed):
    """After a first edit that failed: leave the folder as it was found."""
    import shutil

    from speechbrain_taskarith.vectors.editing.log import (
        LOCK_NAME,
        LOG_NAME,
        EditLog,
    )

    if not (folder / LOG_NAME).is_file() or EditLog.read(folder).edits:
        return
    for name in (LOG_NAME, LOCK_NAME, "base.ckpt", "base.safetensors"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "vectors", ignore_errors=True)
    if not existed:
        folder.rmdir()


def _would_learn(options, finetuned, scale):
    """Compute the edit in memory, and write nothing."""
    from speechbrain_taskarith.vectors import TaskVector, as_state
    from speechbrain_taskarith.vectors.editing.schedules import scheduled_scale
    from speechbrain_taskarith.vectors.encodings import encode
    from speechbrain_taskarith.vectors.rules.description import (
        build_rule,
        combine,
    )

    patterns = {}
    if _is_new(options):
        rule, number = from_words(options.rule), 1
        base = shared.open_weights(options.base, options)
        encoding = options.encoding or "lossless"
    else:
        editor = _open(options, starting=False, read_only=True)
        log = read_log(options.folder)
        if options.name in [edit.name for edit in editor.log]:
            raise ValueError(
                f"{options.folder}: {options.name!r} was learned already"
            )
        base, encoding = as_state(editor.state()), log.encoding
        rule = from_words(options.rule) if options.rule else None
        rule, number = rule or build_rule(log.rule), len(log.edits) + 1
        scale = log.schedule if scale is None else scale
        patterns = {"include": log.include, "exclude": log.exclude}
    base = as_state(base)
    vector = TaskVector.between(base, finetuned, **patterns)
    vector = combine(rule, [vector], base)
    scale = scheduled_scale(scale, number, rule, vector)
    vector.scales(scale)
    stored, _ = encode(dict(vector), encoding)
    count = sum(as_state(stored).info(name).nbytes for name in stored)
    line = (
        f"would learn {options.name!r} with scale {scale}: a vector of norm "
        f"{vector.norm():.4g}, {size(count)} {encoding}"
    )
    data = {
        "verb": "edit learn",
        "dry_run": True,
        "name": options.name,
        "scale": scale,
        "rule": rule.describe(),
        "norm": vector.norm(),
        "bytes": count,
        "encoding": encoding,
    }
    return Result([line], data)
