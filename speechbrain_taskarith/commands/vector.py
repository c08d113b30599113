"""`taskarith vector`: what fine-tuning added, as a file."""

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import (
    Result,
    counted,
    matched,
    size,
    steps,
)

_EXAMPLES = """\
  taskarith vector results/base/save results/us/save -o us.safetensors
  taskarith vector base.ckpt us.ckpt -o us.safetensors --encoding bf16
  taskarith vector base us -o us.safetensors --exclude 'ctc_lin.*' --dry-run
  taskarith vector base.safetensors peft_folder --lora -o us.safetensors
"""


def add_parser(verbs):
    """Add the verb's parser.

    Arguments
    ---------
    verbs : argparse subparsers
        Where to.
    """
    parser = shared.add_verb(
        verbs,
        "vector",
        "Subtract: store fine-tuned minus base as a task vector.",
        _EXAMPLES,
        run,
    )
    parser.add_argument("base", metavar="BASE", help="weights before")
    parser.add_argument("finetuned", metavar="FINETUNED", help="weights after")
    shared.add_writing(parser)
    shared.add_patterns(parser)
    shared.add_recoverable(parser)
    parser.add_argument(
        "--encoding",
        default="lossless",
        help="lossless, bf16, int8, sparse, sparse-bf16 or sparse-int8 "
        "(lossless)",
    )
    parser.add_argument(
        "--buffers",
        choices=("base", "edit"),
        default="base",
        help="running statistics: leave the base's alone, or take them in",
    )
    parser.add_argument(
        "--not-strict",
        action="store_true",
        help="leave out what is on one side only, with a warning",
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="FINETUNED is the folder of a LoRA, as PEFT saves it",
    )
    parser.set_defaults(words={"strict=False": "--not-strict"})


def run(options):
    """Make and store the vector.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        What was written.
    """
    inputs = [options.base, options.finetuned]
    output = shared.check_output(
        options.output,
        inputs,
        options.overwrite,
        suffixes=(".safetensors",),
        what="a task vector",
    )
    with steps(2, not options.no_progress) as step:
        step("subtracting")
        base = shared.open_weights(options.base, options)
        tau = _subtract(base, options)
        step("storing")
        store = _size_if_stored if options.dry_run else _store
        count = store(tau, output, base, options)
    parameters = sum(delta.numel() for delta in tau.values())
    lines, patterns = _patterns(base, tau, options)
    verb = "would write" if options.dry_run else "wrote"
    lines.insert(
        0,
        f"{verb} {output}: {counted(len(tau), 'tensor')}, "
        f"{counted(parameters, 'parameter')}, {size(count)} "
        f"{options.encoding}, norm {tau.norm():.4g}",
    )
    data = {
        "verb": "vector",
        "output": str(output),
        "dry_run": options.dry_run,
        "tensors": len(tau),
        "parameters": parameters,
        "bytes": count,
        "norm": tau.norm(),
        "encoding": options.encoding,
        "base_fingerprint": tau.base_fingerprint,
        "patterns": patterns,
    }
    return Result(lines, data)


def _subtract(base, options):
    from speechbrain_taskarith.vectors import TaskVector

    if options.lora:
        tau = TaskVector.from_lora(base, options.finetuned)
        return tau.restrict(options.include, options.exclude)
    return TaskVector.between(
        base,
        shared.open_weights(options.finetuned, options),
        include=options.include,
        exclude=options.exclude,
        strict=not options.not_strict,
        buffers=options.buffers,
    )


def _store(tau, output, base, options):
    """Write vector and card; return the file's size in bytes."""
    from speechbrain_taskarith.vectors import ModelCard, open_state

    tau.save(output, encoding=options.encoding)
    finetuned = {"role": "fine-tuned", "path": options.finetuned}
    if "finetuned_fingerprint" in tau.metadata:
        finetuned["fingerprint"] = tau.metadata["finetuned_fingerprint"]
    card = ModelCard(
        "Task vector",
        parents=[ModelCard.parent("base", base), finetuned],
        fingerprint=open_state(output).fingerprint,
        notes=[f"stored {options.encoding}; norm {tau.norm():.6g}"],
    )
    card.save(output)
    return output.stat().st_size


def _size_if_stored(tau, output, base, options):
    """Return how many bytes of tensors would be written."""
    from speechbrain_taskarith.vectors import as_state
    from speechbrain_taskarith.vectors.encodings import encode

    tensors, _ = encode(dict(tau), options.encoding)
    stored = as_state(tensors)
    return sum(stored.info(name).nbytes for name in stored)


def _patterns(base, tau, options):
    if not options.dry_run:
        return [], {}
    lines, include = matched(base, options.include, "include")
    more, exclude = matched(base, options.exclude, "exclude")
    left = [name for name in base if name not in tau]
    lines += more + [
        f"  left as they are: {counted(len(left), 'tensor')}"
        + (f" ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})")
        * bool(left)
    ]
    return lines, {"include": include, "exclude": exclude, "left": left}
