"""`taskarith apply`: base plus scaled vectors."""

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    extra_lines,
    extra_notes,
    matched,
    rounding_lines,
    write_weights,
)
from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors.engine.vector_header import kept_extra_in

_EXAMPLES = """\
  taskarith apply base.ckpt us.safetensors --scale 0.4 -o edited.ckpt
  taskarith apply results/base/save us.safetensors -o results/merged/CKPT+us
  taskarith apply base.ckpt us.safetensors \\
      --scale 'encoder.*=0.4' '*=0.1' -o edited.ckpt --dry-run
  taskarith apply base.ckpt us.safetensors de.safetensors \\
      --rule TIES density=0.2 --scale 0.5 -o merged.safetensors
  # SYN2REAL: the mean of the source domains' vectors on the target's model
  taskarith apply target_synthetic.ckpt news.safetensors music.safetensors \\
      --mean --any-base --scale 0.2 -o target.ckpt
  taskarith apply other.pt us.safetensors --key ema --rename 'enc.*=encoder.*' \\
      --any-base -o edited.pt
  # Take an edit back (up to rounding; keep the base for the exact way)
  taskarith apply edited.ckpt us.safetensors --any-base --scale -0.4 -o u.ckpt
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    parents = [
        shared.reading(),
        shared.reading("rename", "prefix", "key", "dtype"),
        shared.rule_and_scale("the vectors are added"),
        shared.writing(),
    ]
    parser = shared.add_verb(verbs, "apply", summary, _EXAMPLES, run, parents)
    add = parser.add_argument
    add("base", metavar="BASE", help="the weights to edit")
    add("vectors", nargs="+", metavar="TAU", help="stored task vectors")
    add(
        "--mean",
        action="store_true",
        help="take the mean of the vectors, not their sum (without --rule)",
    )


def run(options):
    """Apply the vectors and write the result."""
    inputs = [options.base, *options.vectors]
    output = shared.check_output(options.output, inputs, options.overwrite)
    rule = _rule(options)
    options.rename = shared.rename_of(options.rename)
    import torch

    from speechbrain_taskarith.vectors import TaskVector
    from speechbrain_taskarith.vectors.application import rounding_loss
    from speechbrain_taskarith.vectors.states.writers import check_networks

    with shared.threads(options):
        [base] = shared.open_at_key([options.base], options)
        check_networks(base, output)
        base.verify()
        files = progress(
            options.vectors,
            desc="reading",
            show_progress=not options.no_progress,
        )
        chosen = shared.patterns(options)
        vectors = map(TaskVector.load, files)
        vectors = [
            tau.named_as(base).restrict(**chosen)
            for tau in shared.renamed(vectors, options.vectors, options)
        ]
        merged = rule.combine(vectors, base=base)
        scale, how = rule.scale_for(merged), {"dtype": options.dtype}
        edited = merged.apply(
            base, scale, any_base=bool(options.any_base), **how
        )
        loss = rounding_loss(merged, base, edited, merged.scales(scale))
    result = write_weights(
        edited,
        output,
        _card(base, vectors, rule, options),
        like=options.base,
        recoverable=",".join(base.networks) or options.recoverable,
        dry_run=options.dry_run,
    )
    data = {"verb": "apply", "rule": rule.describe(), "scale": rule.scale}
    result.data = {**data, **result.data}
    result.data["rounding_loss"] = loss
    result.lines += rounding_lines(loss)
    kept = kept_extra_in(merged.metadata)
    result.data["extra_of_base"] = kept
    result.lines += extra_lines(kept)
    if options.dry_run:
        if isinstance(rule.scale, dict):
            lines, found = matched(vectors[0], rule.scale, "scale")
            result.lines += lines
            result.data["patterns"] = found
        changed = sum(not torch.equal(edited[n], base[n]) for n in vectors[0])
        result.lines.append(
            f"  {rule!r} changes {changed} of {len(base)} tensors"
        )
        result.data["changed"] = changed
    return result


def _rule(options):
    from speechbrain_taskarith.vectors import TaskArithmetic

    scale = shared.scale_of(options.scale)
    if options.rule is not None:
        if options.mean:
            raise ValueError(
                "--mean and --rule exclude each other; for the mean of the "
                "vectors leave --rule out"
            )
        return shared.rule_of(options.rule, scale)
    number = len(options.vectors)
    weights = [1 / number] * number if options.mean else None
    return TaskArithmetic(1.0 if scale is None else scale, weights)


def _card(base, vectors, rule, options):
    from speechbrain_taskarith.vectors import ModelCard

    parents = [ModelCard.parent("base", base)]
    for tau, path in zip(vectors, options.vectors):
        parents.append({**ModelCard.parent("vector", tau), "file": str(path)})
    return ModelCard(
        "Edited model",
        parents=parents,
        rule=rule,
        scale=rule.scale,
        notes=extra_notes(
            kept_extra_in({"parents": [t.metadata for t in vectors]})
        ),
    )
