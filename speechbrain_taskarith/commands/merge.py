"""`taskarith merge`: many checkpoints into one."""

import re

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.console import (
    Result,
    counted,
    matched,
    size,
)
from speechbrain_taskarith.commands.merge_file import parse_overrides, read_plan
from speechbrain_taskarith.commands.output import write_weights, written
from speechbrain_taskarith.commands.rule_text import from_words, make_rule
from speechbrain_taskarith.utils.files import TEMPORARY_PREFIX

_EXAMPLES = """\
  taskarith merge merge.yaml
  taskarith merge merge.yaml --rule.density 0.3 --output other.safetensors
  taskarith merge --base base.ckpt --finetuned us.ckpt german.ckpt \\
      --rule TIES density=0.2 --scale 0.5 -o merged.ckpt --dry-run

merge.yaml:
  base: results/base/save               # any form that is read
  finetuned:                            # checkpoints or stored vectors
      - results/us/save
      - german.safetensors
  rule: {name: TIES, density: 0.2}      # any rule: docs/task_vectors.md
  scale: 0.5                            # or {"encoder.*": 0.5, "*": 0.1}
  output: merged.safetensors            # or x.ckpt, a folder, CKPT+name
  # optional: recoverable, device, memory_limit (300MB), threads, include,
  # exclude, buffers, any_base, fingerprint
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
        "merge",
        "Merge checkpoints and vectors, streamed in bounded memory. Values "
        "of the file are replaced by --key value, as in SpeechBrain.",
        _EXAMPLES,
        run,
    )
    parser.add_argument(
        "file", nargs="?", metavar="merge.yaml", help="what to merge, and how"
    )
    parser.add_argument("--base", help="the common ancestor")
    parser.add_argument(
        "--finetuned", nargs="+", metavar="PATH", help="what to merge"
    )
    shared.add_rule(parser, "replaces the file's")
    shared.add_writing(parser, required=False)
    words = {"any_base=True": "--any_base true"}
    parser.set_defaults(takes_overrides=True, words=words)


def run(options):
    """Merge.

    Arguments
    ---------
    options : argparse.Namespace
        As parsed.

    Returns
    -------
    console.Result
        The engine's report.
    """
    plan = read_plan(options.file, _overrides(options))
    if options.rule is not None:
        rule = from_words(options.rule, plan.scale)
    else:
        rule = make_rule(plan.rule, plan.scale)
    inputs = [plan.base, *plan.finetuned]
    output = shared.check_output(plan.output, inputs, options.overwrite)
    memory = bytes_of(plan.memory_limit)
    from speechbrain_taskarith.vectors import open_state

    base, *states = (
        open_state(path, recoverable=plan.recoverable) for path in inputs
    )
    if options.dry_run:
        return _would_merge(plan, base, states, rule, output)
    target = _temporary(output)
    try:
        report = _merge(plan, base, states, rule, target, memory, options)
        if target != output:
            _write_checkpoint(target, output, base, report, plan)
        else:
            _card(report).save(output)
    finally:
        if target != output:
            target.unlink(missing_ok=True)
    facts = report.to_dict() | {"output": str(output)}
    data = {"verb": "merge", "dry_run": False, **facts}
    return Result(_shown(facts), data)


def _merge(plan, base, states, rule, target, memory, options):
    from speechbrain_taskarith.vectors import merge_checkpoints

    return merge_checkpoints(
        base,
        states,
        rule,
        target,
        device=plan.device,
        memory_limit=memory,
        threads=plan.threads,
        include=plan.include,
        exclude=plan.exclude,
        buffers=plan.buffers,
        any_base=plan.any_base,
        fingerprint=plan.fingerprint,
        progress=not options.no_progress,
    )


def _temporary(output):
    """Where the engine writes: beside a `CKPT+` folder, else the output.

    A checkpoint folder holds more than the engine knows of.
    """
    if not output.name.startswith("CKPT+"):
        return output
    return output.with_name(f"{TEMPORARY_PREFIX}{output.name}.safetensors")


def _write_checkpoint(merged, output, base, report, plan):
    """Turn merged weights into a checkpoint with the base's other files."""
    from speechbrain_taskarith.vectors import open_state

    state = open_state(merged)
    tensors = {name: state[name] for name in state}
    # Tied tensors stay tied.
    weights = {n: tensors[base.aliases.get(n, n)] for n in tensors}
    card = _card(report)
    write_weights(
        weights,
        output,
        card,
        like=plan.base,
        recoverable=plan.recoverable,
    )


def _card(report):
    from speechbrain_taskarith.vectors import ModelCard

    kinds = {"checkpoint": "fine-tuned", "task vector": "vector"}
    return ModelCard(
        "Merged model",
        parents=[
            {"role": "base", **report.base},
            *(
                {
                    "role": kinds.get(parent["kind"], parent["kind"]),
                    "path": parent["path"],
                    "fingerprint": parent["fingerprint"],
                }
                for parent in report.parents
            ),
        ],
        rule=report.rule,
        scale=report.rule.get("scale"),
        fingerprint=report.fingerprint,
    )


def _shown(facts):
    memory = facts["peak_anonymous"]
    return [
        f"wrote {facts['output']}",
        f"  edited {counted(facts['edited'], 'tensor')} "
        f"({counted(facts['parameters'], 'parameter')}), copied "
        f"{facts['copied']} from the base",
        f"  {facts['seconds']['total']:.1f} s, read "
        f"{size(facts['bytes_read'])}, wrote {size(facts['bytes_written'])}"
        + (f", at most {size(memory)} of anonymous memory" if memory else ""),
        f"  fingerprint {facts['fingerprint']}",
    ]


def _overrides(options):
    found = parse_overrides(options.overrides)
    for key in ("base", "finetuned", "output"):
        if getattr(options, key) is not None:
            found.append((key, getattr(options, key)))
    if options.scale is not None:
        found.append(("scale", shared.scale_of(options.scale)))
    if options.rule is not None:
        found.append(("rule", options.rule[0]))
    return found


def bytes_of(text):
    """Return a number of bytes.

    Arguments
    ---------
    text : int, str or None
        E.g. `300000000`, `"300MB"`, `"1.5 GiB"`.

    Returns
    -------
    int or None
        Bytes.

    Raises
    ------
    ValueError
        Neither a number nor one with a unit.

    Example
    -------
    >>> bytes_of("300MB"), bytes_of("2 KiB")
    (300000000, 2048)
    """
    if text is None or isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", str(text), re.I)
    if not found:
        raise ValueError(
            f"memory_limit: {text!r}; expected bytes, or e.g. 300MB, 1GiB"
        )
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _would_merge(plan, base, states, rule, output):
    """Check all that can be seen without reading weights."""
    from speechbrain_taskarith.vectors.engine.inputs import MergeInputs

    inputs = MergeInputs(base, states, plan.include, plan.exclude, plan.buffers)
    rule.check_number(inputs.number)
    rule.scales(inputs.names)
    if plan.fingerprint and not plan.any_base:
        inputs.check_ancestry()
    data = {"verb": "merge", "rule": rule.describe(), "patterns": {}}
    lines = [f"  {rule!r}"]
    for parent in inputs.parents:
        lines.append(f"  {parent.kind} {parent.label}")
    chosen = {"include": plan.include, "exclude": plan.exclude}
    if isinstance(rule.scale, dict):
        chosen["scale"] = rule.scale
    for what, patterns in chosen.items():
        names = inputs.names if what == "scale" else base
        more, data["patterns"][what] = matched(names, patterns, what)
        lines += more
    lines.append(f"  copied from the base: {_listed(inputs.copied)}")
    result = written(output, base, dry_run=True)
    result.lines += lines
    result.data = {
        **data,
        **result.data,
        "edited": inputs.names,
        "copied": inputs.copied,
    }
    return result


def _listed(names, most=5):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
