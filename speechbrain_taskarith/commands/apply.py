"""`taskarith apply`: base plus scaled vectors."""

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import matched
from speechbrain_taskarith.commands.output import write_weights, written
from speechbrain_taskarith.commands.rule_text import from_words, make_rule
from speechbrain_taskarith.utils.progress import progress

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
  # Take an edit back (up to rounding; keep the base for the exact way)
  taskarith apply edited.ckpt us.safetensors --any-base --scale -0.4 -o u.ckpt
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
        "apply",
        "Edit weights: base + scale * vectors.",
        _EXAMPLES,
        run,
    )
    parser.add_argument("base", metavar="BASE", help="the weights to edit")
    parser.add_argument(
        "vectors", nargs="+", metavar="TAU", help="stored task vectors"
    )
    shared.add_writing(parser)
    shared.add_recoverable(parser)
    shared.add_rule(parser, "the vectors are added")
    parser.add_argument(
        "--mean",
        action="store_true",
        help="take the mean of the vectors, not their sum (no --rule then)",
    )
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="allow vectors that were taken from other weights than BASE",
    )
    parser.set_defaults(words={"any_base=True": "--any-base"})


def run(options):
    """Apply the vectors and write the result.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        What was written.
    """
    inputs = [options.base, *options.vectors]
    output = shared.check_output(options.output, inputs, options.overwrite)
    rule = _rule(options)
    from speechbrain_taskarith.vectors import ModelCard, TaskVector, as_state

    base = shared.open_weights(options.base, options)
    base.verify()
    files = progress(
        options.vectors, desc="reading", enable=not options.no_progress
    )
    vectors = [TaskVector.load(path) for path in files]
    edited = rule(base, vectors, any_base=options.any_base)
    state = as_state(edited)
    data = {"verb": "apply", "rule": rule.describe(), "scale": rule.scale}
    if options.dry_run:
        result = written(output, state, dry_run=True)
        scale = rule.scale
        if isinstance(scale, dict):
            lines, data["patterns"] = matched(vectors[0], scale, "scale")
            result.lines += lines
        changed = sum(
            not _same(edited[name], base[name]) for name in vectors[0]
        )
        result.lines.append(
            f"  {rule!r} changes {changed} of {len(base)} tensors"
        )
        data["changed"] = changed
    else:
        card = ModelCard(
            "Edited model",
            parents=[
                ModelCard.parent("base", base),
                *(
                    {**ModelCard.parent("vector", tau), "file": str(path)}
                    for tau, path in zip(vectors, options.vectors)
                ),
            ],
            rule=rule.describe(),
            scale=rule.scale,
        )
        result = write_weights(
            edited,
            output,
            card,
            like=options.base,
            recoverable=options.recoverable,
        )
    result.data = {**data, **result.data}
    return result


def _rule(options):
    scale = shared.scale_of(options.scale)
    if options.rule is not None:
        if options.mean:
            raise ValueError(
                "--mean and --rule exclude each other; for the mean of the "
                "vectors leave --rule out"
            )
        return from_words(options.rule, scale)
    weights = None
    if options.mean:
        weights = [1 / len(options.vectors)] * len(options.vectors)
    return make_rule({"name": "TaskArithmetic", "weights": weights}, scale)


def _same(one, other):
    import torch

    return torch.equal(one, other)
