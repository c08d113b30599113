"""`taskarith vector`: what fine-tuning added, as a file."""

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    Result,
    counted,
    extra_lines,
    extra_notes,
    listed,
    matched,
    size,
    steps,
    stored_size,
)
from speechbrain_taskarith.vectors.engine.vector_header import kept_extra_in

_EXAMPLES = """\
  taskarith vector results/base/save results/us/save -o us.safetensors
  taskarith vector base.ckpt us.ckpt -o us.safetensors --encoding bf16
  taskarith vector base us -o us.safetensors --exclude 'ctc_lin.*' --dry-run
  taskarith vector base ema.pt -o ema.safetensors --key ema --prefix encoder.
  taskarith vector base old -o old.safetensors --rename '*.gamma=*.weight'
  taskarith vector base.safetensors peft_folder --lora -o us.safetensors
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    names = shared.reading("rename", "prefix", "key")
    parents = [shared.reading(), names, shared.writing()]
    parser = shared.add_verb(verbs, "vector", summary, _EXAMPLES, run, parents)
    parser.add_argument("base", metavar="BASE", help="weights before")
    parser.add_argument("finetuned", metavar="FINETUNED", help="weights after")
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
        help="running statistics: keep the base's (base), or edit them too",
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


def run(options):
    """Make and store the vector."""
    from speechbrain_taskarith.vectors.products import ties_of

    output = shared.check_output(
        options.output,
        [options.base, options.finetuned],
        options.overwrite,
        suffixes=(".safetensors",),
        what="a task vector",
    )
    progress = steps(2, not options.no_progress)
    with shared.threads(options), progress as step:
        step("subtracting")
        base, tau = _subtract(options)
        norm = tau.norm()
        step("storing")
        if options.dry_run:
            count = stored_size(tau, options.encoding)
        else:
            count = _store(tau, output, base, options)
    ties = ties_of(tau)
    parameters = sum(
        delta.numel() for n, delta in tau.items() if ties.get(n, n) == n
    )
    verb = "would write" if options.dry_run else "wrote"
    line = (
        f"{verb} {output}: {counted(len(tau), 'tensor')}, "
        f"{counted(parameters, 'parameter')}, {size(count)} "
        f"{options.encoding}, norm {norm:.4g}"
    )
    kept = kept_extra_in(tau.metadata)
    lines, patterns = [line, *extra_lines(kept)], {}
    if options.dry_run:
        for what, chosen in shared.patterns(options).items():
            more, patterns[what] = matched(base, chosen, what)
            lines += more
        patterns["left"] = [name for name in base if name not in tau]
        lines.append(f"  left as they are: {listed(patterns['left'])}")
    data = {
        "verb": "vector",
        "output": str(output),
        "dry_run": options.dry_run,
        "tensors": len(tau),
        "parameters": parameters,
        "bytes": count,
        "norm": norm,
        "encoding": options.encoding,
        "base_fingerprint": tau.base_fingerprint,
        "patterns": patterns,
        "extra_of_base": kept,
    }
    return Result(lines, data)


def _subtract(options):
    """Return the base and the vector."""
    from speechbrain_taskarith.vectors import TaskVector

    chosen = shared.patterns(options)
    if options.lora:
        base = shared.open_weights(options.base, options)
        tau = TaskVector.from_lora(base, options.finetuned)
        return base, tau.restrict(**chosen)
    options.rename = shared.rename_of(options.rename)
    base, finetuned = shared.open_models(
        options.base, [options.finetuned], options
    )
    return base, TaskVector.between(
        base,
        finetuned,
        strict=not options.not_strict,
        buffers=options.buffers,
        **chosen,
    )


def _store(tau, output, base, options):
    """Write vector and card; return the file's size in bytes."""
    from speechbrain_taskarith.vectors import ModelCard, open_state

    tau.save(output, encoding=options.encoding)
    finetuned = {"role": "fine-tuned", "path": options.finetuned}
    if "finetuned_fingerprint" in tau.metadata:
        finetuned["fingerprint"] = tau.metadata["finetuned_fingerprint"]
    notes = [f"stored {options.encoding}; norm {tau.norm():.6g}"]
    tau.card(
        parents=[ModelCard.parent("base", base), finetuned],
        fingerprint=open_state(output).fingerprint,
        notes=[*notes, *extra_notes(kept_extra_in(tau.metadata))],
    ).save(output)
    return output.stat().st_size
