"""`taskarith merge`: many checkpoints into one, as a merge file says."""

import argparse
import copy
import itertools
from collections.abc import Mapping
from types import SimpleNamespace

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    Result,
    counted,
    extra_lines,
    extra_notes,
    listed,
    matched,
    rounding_lines,
    size,
    write_weights,
    written,
)
from speechbrain_taskarith.utils.files import temporary_path
from speechbrain_taskarith.vectors.checks import bytes_of
from speechbrain_taskarith.vectors.rules.description import (
    from_plain,
    with_each,
)

_EXAMPLES = """\
  taskarith merge merge.yaml
  taskarith merge merge.yaml --rule.density 0.3 --output other.safetensors
  taskarith merge --base base.ckpt --finetuned us.ckpt german.ckpt \\
      --rule TIES density=0.2 --scale 0.5 -o merged.ckpt --dry-run
  taskarith merge --base openai/whisper-base --finetuned dutch/ czech/ \\
      --rule TIES density=0.5 -o whisper-merged

merge.yaml:
  base: results/base/save               # any form that is read
  finetuned:                            # checkpoints or stored vectors
      - results/us/save
      - german.safetensors
  rule: {name: TIES, density: 0.2}      # see `taskarith rules`
  scale: 0.5                            # or {"encoder.*": 0.5, "*": 0.1}
  weights: [1.0, 0.5]                   # one for each of `finetuned`
  densities: [0.2, 0.5]                 # the same, for rules that trim
  output: merged.safetensors            # or x.ckpt, a folder, CKPT+name
  # optional: recoverable, device, memory_limit (300MB), threads, include,
  # exclude, buffers, any_base, fingerprint, dtype (of the output),
  # key (where weights lie in a file), prefix and rename ({"*.gamma":
  # "*.weight"}): names of what is fine-tuned, as the base has them
"""

# What a merge file may hold, the types of each value, and its default.
_NEEDED = object()
_KEYS = {
    "base": (str, _NEEDED),
    "finetuned": (list, _NEEDED),
    "rule": ((str, Mapping), _NEEDED),
    "output": (str, _NEEDED),
    "scale": ((int, float, Mapping, type(None)), None),
    "weights": ((list, type(None)), None),
    "densities": ((list, type(None)), None),
    "recoverable": ((str, type(None)), None),
    "device": (str, "cpu"),
    "memory_limit": ((int, str, type(None)), None),
    "threads": ((int, type(None)), None),
    "include": (list, ["*"]),
    "exclude": (list, []),
    "buffers": (str, "base"),
    "any_base": (bool, False),
    "fingerprint": (bool, True),
    "dtype": ((str, type(None)), None),
    "rename": ((Mapping, type(None)), None),
    "prefix": ((str, type(None)), None),
    "key": ((str, type(None)), None),
}
_REQUIRED = [key for key, (_, default) in _KEYS.items() if default is _NEEDED]
_LISTS = [key for key, (kinds, _) in _KEYS.items() if kinds is list]
_PLACEHOLDER = "!PLACEHOLDER"
# Elements that a dry run reads to estimate what rounding will lose.
_SAMPLE = 1 << 22


def add_parser(verbs, summary):
    """Add the verb's parser."""
    about = (
        "Merge checkpoints and vectors, streamed in bounded memory. Options "
        "replace the values of the merge file; a dot leads into the rule: "
        "--rule.density 0.3."
    )
    parents = [
        shared.reading(),
        shared.reading("dtype", "rename", "prefix", "key"),
        shared.rule_and_scale("replaces the file's"),
        shared.writing(required=False),
    ]
    parser = shared.add_verb(
        verbs, "merge", summary, _EXAMPLES, run, parents, about
    )
    add = parser.add_argument
    add("file", nargs="?", metavar="merge.yaml", help="what to merge, and how")
    add("--base", help="the common ancestor")
    add("--finetuned", nargs="+", metavar="PATH", help="what to merge")
    each = {"nargs": "+", "type": float, "metavar": "NUMBER"}
    add("--weights", help="one for each input, for rules with weights", **each)
    add("--densities", help="one for each input, for rules that trim", **each)
    add("--device", help="where to compute, e.g. cuda:0 (cpu)")
    add(
        "--memory-limit",
        "--memory_limit",
        metavar="BYTES",
        help="most memory for buffers, e.g. 300MB",
    )
    add(
        "--buffers",
        metavar="base|edit",
        help="running statistics: keep the base's (base), or edit them too",
    )
    add(
        "--fingerprint",
        action=argparse.BooleanOptionalAction,
        help="check and note fingerprints, which reads all bytes once more",
    )
    parser.set_defaults(takes_overrides=True)


def run(options):
    """Merge."""
    plan = read_plan(options.file, _overrides(options))
    rule = rule_of(plan, options.file)
    inputs = [plan.base, *plan.finetuned]
    output = shared.check_output(plan.output, inputs, options.overwrite)
    if plan.memory_limit is not None:
        plan.memory_limit = bytes_of("memory_limit", plan.memory_limit)
    base, *states = shared.open_models(plan.base, plan.finetuned, plan)
    if options.dry_run:
        return _would_merge(plan, base, states, rule, output)
    report = _merge(plan, base, states, rule, output, not options.no_progress)
    data = {"verb": "merge", "dry_run": False, **report.to_dict()}
    memory = report.peak_anonymous
    lines = [
        f"wrote {output}",
        f"  edited {counted(report.edited, 'tensor')} "
        f"({counted(report.parameters, 'parameter')}), copied "
        f"{report.copied} from the base",
        f"  {report.seconds['total']:.1f} s, read {size(report.bytes_read)}, "
        f"wrote {size(report.bytes_written)}"
        + (f", at most {size(memory)} of anonymous memory" if memory else ""),
        f"  fingerprint {report.fingerprint}",
        *rounding_lines(report.rounding_loss),
        *extra_lines(report.extra_of_base),
    ]
    return Result(lines, {**data, "output": str(output)})


def rule_of(plan, file=None):
    """Make the rule of a plan; errors name the file it is from."""
    each = {"weights": plan.weights, "densities": plan.densities}
    try:
        return with_each(from_plain(plan.rule, plan.scale), **each)
    except ValueError as error:
        where = f"{file}: " if file else ""
        raise ValueError(f"{where}{error}") from None


def _merge(plan, base, states, rule, output, show_progress):
    """Merge into the output, and write its card."""
    from speechbrain_taskarith.vectors import merge_checkpoints, open_state
    from speechbrain_taskarith.vectors.engine.inputs import MergeInputs

    # A checkpoint folder holds more than the engine knows of: that writes
    # beside it.
    folder, target = output.name.startswith("CKPT+"), output
    extra, base = base.extra, copy.copy(base)
    recoverable = ",".join(base.networks) or plan.recoverable
    kept = None
    if folder:
        chosen = (plan.include, plan.exclude, plan.buffers)
        kept = MergeInputs(base, states, *chosen).differing_extra()
        base.extra, base.networks = {}, ()
        target = temporary_path(output).with_suffix(".safetensors")
    keys = ("device", "memory_limit", "threads", "include", "exclude")
    keys += ("buffers", "any_base", "fingerprint", "dtype")
    how = {
        "show_progress": show_progress,
        **{key: getattr(plan, key) for key in keys},
    }
    try:
        report = merge_checkpoints(base, states, rule, target, **how)
        if kept is not None:
            report.extra_of_base = kept
        card = _card(report)
        if not folder:
            card.save(output)
            return report
        merged = dict(open_state(target, as_stored=True))
        # Tied tensors stay tied.
        weights = {n: merged[base.aliases.get(n, n)] for n in merged}
        weights |= extra
        write_weights(
            weights, output, card, like=plan.base, recoverable=recoverable
        )
        return report
    finally:
        if folder:
            target.unlink(missing_ok=True)


def _card(report):
    from speechbrain_taskarith.vectors import ModelCard

    roles = {"checkpoint": "fine-tuned", "task vector": "vector"}
    parents = [
        {
            "role": roles[parent["kind"]],
            "path": parent["path"],
            "fingerprint": parent["fingerprint"],
        }
        for parent in report.parents
    ]
    return ModelCard(
        "Merged model",
        parents=[{"role": "base", **report.base}, *parents],
        rule=report.rule,
        scale=report.rule.get("scale"),
        fingerprint=report.fingerprint,
        notes=extra_notes(report.extra_of_base),
    )


def _would_merge(plan, base, states, rule, output):
    """Check all that can be seen without reading weights."""
    from speechbrain_taskarith.vectors.engine.inputs import MergeInputs

    inputs = MergeInputs(base, states, plan.include, plan.exclude, plan.buffers)
    inputs.scales(rule)
    if not plan.any_base:
        inputs.check_ancestry(plan.fingerprint)
    result = written(output, base, dry_run=True)
    result.lines.append(f"  {rule!r}")
    for parent in inputs.parents:
        result.lines.append(f"  {parent.kind} {parent.label}")
    chosen = {"include": plan.include, "exclude": plan.exclude}
    if isinstance(rule.scale, dict):
        chosen["scale"] = rule.scale
    found = {}
    for what, patterns in chosen.items():
        names = inputs.names if what == "scale" else base
        lines, found[what] = matched(names, patterns, what)
        result.lines += lines
    result.lines.append(f"  copied from the base: {listed(inputs.copied)}")
    loss = _estimated_loss(inputs, rule, plan.dtype)
    result.lines += rounding_lines(loss, estimated=True)
    kept = inputs.differing_extra()
    result.lines += extra_lines(kept)
    result.data = {
        "verb": "merge",
        "rounding_loss": loss,
        "extra_of_base": kept,
        "rule": rule.describe(),
        "patterns": found,
        **result.data,
        "edited": inputs.names,
        "copied": inputs.copied,
    }
    return result


def _estimated_loss(inputs, rule, dtype):
    """Return the share of the edit that rounding will lose, of a sample.

    None where the rule cannot be applied to some of the tensors alone.
    """
    from speechbrain_taskarith.vectors import TaskVector, as_state
    from speechbrain_taskarith.vectors.application import edited, rounding_loss
    from speechbrain_taskarith.vectors.checks import floating

    base = inputs.base
    stored = dtype and floating(dtype)
    if stored in ("float32", "float64"):
        return 0.0
    names = [
        name
        for name in inputs.shapes
        if stored or base.info(name).dtype in ("F16", "BF16")
    ]
    # Small ones first: many layers for little time.
    sample, size_left = [], _SAMPLE
    for name in sorted(names, key=lambda name: base.info(name).numel):
        size_left -= base.info(name).numel
        if size_left < 0 and sample:
            break
        sample.append(name)
    if not sample:
        return 0.0
    vectors = []
    for parent in inputs.parents:
        own = {name: parent.state[name].float() for name in sample}
        if parent.kind == "checkpoint":
            own = {name: own[name] - base[name].float() for name in own}
        vectors.append(TaskVector(own))
    part = as_state({name: base[name] for name in sample})
    try:
        merged = rule.combine(vectors, base=part)
    except (ValueError, KeyError):
        return None
    scales = inputs.scales(rule)
    result = edited(merged, part, scales, dtype)
    return rounding_loss(merged, part, result, scales)


def read_plan(path=None, overrides=()):
    """Read a merge file and what replaces its values.

    The file holds plain YAML values: a tag such as `!new:` is refused, so
    that a file from elsewhere cannot build anything. `!PLACEHOLDER` marks
    what the overrides have to give. Paths are relative to where the command
    runs. `overrides`: `(key, value)`; a dot leads into a mapping
    (`rule.density`).

    Example
    -------
    >>> path = getfixture("tmpdir") / "merge.yaml"
    >>> _ = path.write("base: a.ckpt\\nfinetuned: [b.ckpt]\\nrule: TIES\\n")
    >>> plan = read_plan(path, [("output", "c.ckpt"), ("rule.density", 0.5)])
    >>> plan.rule, plan.output
    ({'name': 'TIES', 'density': 0.5}, 'c.ckpt')
    """
    label = "merge" if path is None else str(path)
    content = {} if path is None else _load(path)
    for key, value in overrides:
        _set(content, key, value)
    if unknown := [key for key in content if key not in _KEYS]:
        raise ValueError(
            f"{label}: unknown {', '.join(map(repr, unknown))}; a merge file "
            f"holds: {', '.join(_KEYS)}"
        )
    for key in _KEYS:
        if content.get(key) == _PLACEHOLDER:
            raise ValueError(f"{label}: {key} is to be given: --{key} VALUE")
    if missing := [k for k in _REQUIRED if content.get(k) in (None, "", [])]:
        raise ValueError(
            f"{label}: lacks {', '.join(missing)}; write it into the file or "
            f"give --{missing[0]} VALUE"
        )
    plan = SimpleNamespace()
    for key, (kinds, default) in _KEYS.items():
        value = content.get(key, default)
        if kinds is list and isinstance(value, str):
            value = [value]
        if not isinstance(value, kinds):
            raise ValueError(
                f"{label}: {key} is a {type(value).__name__} ({value!r}), "
                "which it cannot be"
            )
        for entry in value if kinds is list else ():
            if not isinstance(entry, str):
                raise ValueError(
                    f"{label}: {key}: expected a list of texts, got {entry!r}"
                )
        setattr(plan, key, value)
    return plan


def _load(path):
    import yaml

    # Plain values, and SpeechBrain's mark for what is to be given.
    marks = {_PLACEHOLDER: lambda *_: _PLACEHOLDER}
    try:
        with open(path, encoding="utf-8") as stream:
            content = shared.read_yaml(stream, marks)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1
        raise ValueError(
            f"{path}: line {line}: a merge file holds plain values, no tags "
            f"({error.problem}); write a rule as rule: {{name: TIES, "
            "density: 0.2}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: expected a mapping with {', '.join(_REQUIRED)}, found "
            f"{type(content).__name__}"
        )
    return dict(content)


def _set(content, key, value):
    head, dot, rest = key.partition(".")
    if not dot:
        content[head] = value
        return
    inner = content.get(head)
    if isinstance(inner, str) and head == "rule":
        inner = {"name": inner}
    if not isinstance(inner, Mapping):
        raise ValueError(
            f"--{key}: {head!r} is not a mapping in the merge file, so "
            f"{rest!r} cannot be set"
        )
    content[head] = dict(inner)
    _set(content[head], rest, value)


def _overrides(options):
    """Return what the command line says of the plan, as `(key, value)`."""
    given = {key: getattr(options, key) for key in _KEYS}
    given["rename"] = shared.rename_of(options.rename) or None
    given["scale"] = shared.scale_of(options.scale)
    if options.rule is not None:
        given["rule"] = shared.rule_words(options.rule)
    for key in _LISTS:
        if words := given[key]:
            # A word may be a YAML list, as in SpeechBrain.
            lists = [_yaml(w) if w[:1] + w[-1:] == "[]" else [w] for w in words]
            given[key] = list(itertools.chain(*lists))
    found = [(key, value) for key, value in given.items() if value is not None]
    for word in options.overrides:
        key, _, text = word.removeprefix("--").partition("=")
        found.append((key, _yaml(text)))
    return found


def _yaml(text):
    import yaml

    try:
        return shared.read_yaml(text)
    except yaml.YAMLError:
        raise ValueError(f"{text!r} is not a YAML value") from None
