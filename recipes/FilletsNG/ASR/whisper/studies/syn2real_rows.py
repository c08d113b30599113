"""The rows of SYN2REAL's table: sums of task vectors, `{model: weight}`.

A model is a training (`real/cs`), a part of what it learned
(`real/cs@model.encoder.*`), or what a rule makes of several differences
(`ties/cs+en`). Scales are points (b, a, c) of `b d + a r - c s`, where d, r and
s are what synthetic target, real source and synthetic source speech taught.
"""

from speechbrain_taskarith.vectors import TIES, TSVM

PAPER_SCALE = 0.25
TARGET_SCALES = (0.25, 0.5, 0.75, 1.0)
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
ENCODER, DECODER = "@model.encoder.*", "@model.decoder.*"
#: Rows whose training begins with all speech of the sources.
MIXED = ("mixed", "mixed_then_synthetic", "mixed_edited")
#: Instead of the mean of several differences.
RULES = {"ties": TIES(density=0.5), "tsvm": TSVM()}


def surface():
    """Return the points of `b d + a (r - s)` that are tried."""
    return [(b, a, a) for b in TARGET_SCALES for a in SCALES]


def points():
    """Return all points that are tried, the simplest first."""
    three = [
        (b, a, share * a)
        for b in TARGET_SCALES
        for a in SCALES[1:-1]
        for share in (0.0, 0.5)
    ]
    support = [(1.0, a, 0.0) for a in SCALES]
    return list(dict.fromkeys([*surface(), *support, *three]))


#: What each row may choose from.
CHOICES = {
    "shrunk": [(b, 0.0, 0.0) for b in TARGET_SCALES],
    "edited": [(1.0, a, a) for a in SCALES],
    "both": surface(),
    "support": [(1.0, a, 0.0) for a in SCALES],
    "three": points(),
}


def edit(target, sources, b, a, c=None, part=""):
    """Return the weights of `b d + mean(a r - c s)`; c is a unless given.

    `part`: `@pattern` takes the sources where names fit it only.
    """
    weights = {f"synthetic/{target}": b}
    for source in sources:
        weights[f"real/{source}{part}"] = a / len(sources)
        weights[f"synthetic/{source}{part}"] = -(a if c is None else c) / len(
            sources
        )
    return weights


def edit_parts(target, sources, b, encoder, decoder):
    """Return the weights of an edit with a scale for either part."""
    return edit(target, sources, b, encoder, part=ENCODER) | edit(
        target, sources, b, decoder, part=DECODER
    )


def by_rule(rule, target, sources, b, a):
    """Return the weights of an edit whose differences a rule merges."""
    if rule == "tsvm":  # a sum
        a /= len(sources)
    return {f"synthetic/{target}": b, f"{rule}/{'+'.join(sources)}": a}


def rows_of(target, sources, helpers, chosen):
    """Name the rows of the table: `{row: {model: weight}}`.

    `chosen`: see `Study.choose`.
    """
    synthetic, both = f"synthetic/{target}", chosen["both"]
    everyone = [*sources, *helpers]
    mixed = f"mixed_then_synthetic/{target}"

    def mean(models):
        return {model: 1 / len(models) for model in models}

    reals = [f"real/{source}" for source in sources]
    rows = {
        "pretrained": {},
        "baseline": {synthetic: 1.0},
        "real_source": mean(reals),
        "mean_of_real_sources": mean([f"real/{name}" for name in everyone]),
        "mean_of_baseline_and_real": mean([synthetic, *reals]),
        "joint": {f"joint/{target}": 1.0},
        "mixed": {f"mixed/{target}": 1.0},
        "mixed_then_synthetic": {mixed: 1.0},
        # As published, the start included.
        "mixed_edited": edit(target, sources, 0.0, PAPER_SCALE) | {mixed: 1.0},
        "support_language": edit(target, sources, *chosen["support"]),
        "shrunk": {synthetic: chosen["shrunk"][0]},
        "paper_scale": edit(target, sources, 1.0, PAPER_SCALE),
        "edited": edit(target, sources, *chosen["edited"]),
        "edited_both": edit(target, sources, *both),
        "edited_both_encoder": edit(target, sources, *both, ENCODER),
        "edited_both_decoder": edit(target, sources, *both, DECODER),
        "edited_by_part": edit_parts(
            target, sources, both[0], *chosen["parts"]
        ),
        "edited_three": edit(target, sources, *chosen["three"]),
        "ensemble": edit(target, everyone, *chosen["edited"]),
        "ensemble_both": edit(target, everyone, *both),
    }
    if len(everyone) > 1:
        for rule in RULES:
            rows[f"ensemble_{rule}"] = by_rule(
                rule, target, everyone, *both[:2]
            )
    return rows | {"real_target": {f"real/{target}": 1.0}}
