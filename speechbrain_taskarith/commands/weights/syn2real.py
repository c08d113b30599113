"""`taskarith syn2real`: real speech of other domains for a synthetic one."""

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import (
    counted,
    matched,
    rounding_lines,
    steps,
    write_weights,
)

_EXAMPLES = """\
  taskarith syn2real news_synthetic.ckpt --source music.ckpt music_syn.ckpt \\
      --scale 0.25 -o news.ckpt
  taskarith syn2real results/nl_syn/save --source results/cs/save \\
      results/cs_syn/save --scale 0.4 --target-scale 0.5 \\
      --base results/base/save -o results/nl/CKPT+edited
  # Several source domains: their mean, or what a rule makes of them
  taskarith syn2real target.ckpt --source a.ckpt a_syn.ckpt \\
      --source b.ckpt b_syn.ckpt --rule TIES density=0.5 -o edited.ckpt
  # The support language's own vector: the base in place of synthetic speech
  taskarith syn2real whisper_nl_syn --source whisper_cs whisper-base \\
      --scale 0.3 -o whisper_nl
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    about = (
        "SYN2REAL: base + target_scale (target - base) + scale * mean(real - "
        "synthetic), all fine-tuned from one base. With a target scale of 1 "
        "the base cancels out."
    )
    parents = [
        shared.reading(),
        shared.reading("dtype", "rename", "prefix", "key"),
        shared.rule_and_scale("the sources' mean"),
        shared.writing(),
    ]
    parser = shared.add_verb(
        verbs, "syn2real", summary, _EXAMPLES, run, parents, about
    )
    add = parser.add_argument
    add(
        "target",
        metavar="TARGET",
        help="tuned on the target's synthetic speech",
    )
    add(
        "--source",
        nargs=2,
        action="append",
        required=True,
        metavar=("REAL", "SYNTHETIC"),
        help="a source domain's two models; may be given several times",
    )
    add(
        "--target-scale",
        "--target_scale",
        nargs="+",
        metavar="SCALE",
        help="share of the target's own vector that is kept, like --scale "
        "(1: all; parameters without a match keep all)",
    )
    add(
        "--base",
        help="what all were fine-tuned from, for a target scale that is not 1",
    )


def run(options):
    """Edit the target and write the result."""
    paths = [path for pair in options.source for path in pair]
    paths += [options.base] * (options.base is not None)
    output = shared.check_output(
        options.output, [options.target, *paths], options.overwrite
    )
    scales = _scales(options)
    options.rename = shared.rename_of(options.rename)
    import torch

    from speechbrain_taskarith.vectors.application import rounding_loss
    from speechbrain_taskarith.vectors.states.writers import check_networks
    from speechbrain_taskarith.vectors.synthetic_to_real import edit_of

    rule = options.rule and _rule(options.rule)
    progress = steps(2, not options.no_progress)
    with shared.threads(options), progress as step:
        step("subtracting")
        target, *others = shared.open_models(options.target, paths, options)
        check_networks(target, output)
        base = others.pop() if options.base is not None else None
        pairs = list(zip(others[::2], others[1::2]))
        edit = edit_of(
            target,
            pairs,
            **scales,
            base=base,
            rule=rule,
            **shared.patterns(options),
        )
        step("adding")
        edited = edit.vector.apply(
            target, edit.scale, any_base=True, dtype=options.dtype
        )
        by_name = edit.vector.scales(edit.scale)
        loss = rounding_loss(edit.vector, target, edited, by_name)
        facts = _facts(edit)
    result = write_weights(
        edited,
        output,
        _card(target, pairs, base, rule, scales),
        like=options.target,
        recoverable=",".join(target.networks) or options.recoverable,
        dry_run=options.dry_run,
    )
    rule = rule.describe() if rule else "mean"
    data = {"verb": "syn2real", "rule": rule, **scales, **facts}
    result.data = {**data, **result.data, "rounding_loss": loss}
    norms = ", ".join(
        f"{k.replace('_', ' ')} {v:.4g}" for k, v in facts.items()
    )
    result.lines += [f"  {norms}", *rounding_lines(loss)]
    if options.dry_run:
        found = {}
        for what, scale in scales.items():
            if isinstance(scale, dict):
                lines, found[what] = matched(edit.difference, scale, what)
                result.lines += lines
        changed = sum(
            not torch.equal(edited[n], target[n]) for n in edit.vector
        )
        result.lines.append(
            f"  changes {changed} of {counted(len(target), 'tensor')}"
        )
        result.data |= {"changed": changed, "patterns": found}
    return result


def _scales(options):
    """Return both scales, with their defaults."""
    given = {
        "scale": (shared.scale_of(options.scale), 0.2),
        "target_scale": (
            shared.scale_of(options.target_scale, "--target-scale"),
            1.0,
        ),
    }
    scales = {k: d if v is None else v for k, (v, d) in given.items()}
    if scales["target_scale"] != 1 and options.base is None:
        raise ValueError(
            "--target-scale is a share of what the target learned since the "
            "base: give --base, the model that all were fine-tuned from"
        )
    return scales


def _rule(words):
    if "scale" in shared.rule_words(words):
        raise ValueError(
            f"--rule {' '.join(words)}: the scale is given by --scale"
        )
    return shared.rule_of(words)


def _facts(edit):
    """Return the lengths of what is added, and the angle between them."""
    facts = {"difference_norm": edit.difference.norm()}
    if edit.back is not None:
        facts["target_norm"] = edit.back.norm()
        facts["cosine"] = -edit.back.cosine(edit.difference)
    return facts


def _card(target, pairs, base, rule, scales):
    from speechbrain_taskarith.vectors import ModelCard

    parents = [ModelCard.parent("target, synthetic", target)]
    for real, synthetic in pairs:
        parents.append(ModelCard.parent("source, real", real))
        parents.append(ModelCard.parent("source, synthetic", synthetic))
    if base is not None:
        parents.append(ModelCard.parent("base", base))
    sources = {"sources": rule.describe() if rule else "mean"}
    return ModelCard(
        "Model moved from synthetic towards real speech",
        parents=parents,
        rule={"rule": "syn2real", **scales, **sources},
        scale=scales["scale"],
    )
