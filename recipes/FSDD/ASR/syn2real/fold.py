"""One left-out domain: its models, its vectors, and what they achieve."""

import statistics

from jiwer import process_words
from models import PRETRAINED, domain_model, joint_model

from speechbrain_taskarith.vectors import TaskVector, search_scale, syn2real

# What a scale is chosen on, by the value of `choose_on`, and what only the
# oracle looks at.
CHOSEN_ON = {
    "sources_as_targets": "real_source",
    "edited_target": "real_source+synthetic_target",
}
REAL_TARGET = "real_target"


class Fold:
    """One left-out domain.

    Arguments
    ---------
    target : str
        The domain that is left out.
    brain : SyntheticToReal
        Decodes.
    models : StudyModels
        All models, trained.
    held_out : callable
        `held_out(side, domain, split)` returns strings to measure on.
    hparams : dict
        Of the recipe.
    """

    def __init__(self, target, brain, models, held_out, hparams):
        self.target, self.brain, self.models = target, brain, models
        self.held_out, self.hparams = held_out, hparams
        self.sources = [d for d in hparams["domains"] if d != target]

        def state(side, domain):
            return models.state(domain_model(target, side, domain, hparams))

        self.base = state("synthetic", target)
        self.pairs = {
            source: (state("real", source), state("synthetic", source))
            for source in self.sources
        }
        self.vectors = {
            source: TaskVector.between(synthetic, real)
            for source, (real, synthetic) in self.pairs.items()
        }

    def measure(self):
        """Measure everything about this domain.

        Returns
        -------
        dict
            `rows`: `{row: errors}`; the chosen and the best scale, the
            curves over the scales, and the edited weights.
        """
        model, rows = self.hparams["model"], {}
        model.load_state_dict(dict(self.models.state(PRETRAINED)))
        rows["pretrained"] = self.errors()
        model.load_state_dict(dict(self.models.state(joint_model(self.target))))
        rows["joint"] = self.errors()
        model.load_state_dict(dict(self.base))
        rows["baseline"] = self.errors()

        ensemble = TaskVector.mean(list(self.vectors.values()))
        scale, selection = self.choose_scale(ensemble)
        rows["ensemble"] = rows["edited"] = self.edited(ensemble, scale)
        rows["paper_scale"] = self.edited(ensemble, self.hparams["paper_scale"])
        members = [
            self.edited(vector, scale) for vector in self.vectors.values()
        ]
        rows["members"] = {
            what: statistics.fmean(member[what] for member in members)
            for what in rows["baseline"]
        }
        curve = self.curve(
            self.base,
            ensemble,
            [("real", self.target)],
            self.hparams["report_on"],
            REAL_TARGET,
        )
        best = best_scale(curve)
        rows["oracle"] = self.edited(ensemble, best)
        return {
            "rows": rows,
            "scale": scale,
            "selection": selection,
            "curve": curve,
            "oracle_scale": best,
            "proof": self.proof(),
            "state": syn2real(
                self.base, list(self.pairs.values()), scale=scale
            ),
        }

    def choose_scale(self, tau):
        """Choose the scale without any real target speech.

        With `choose_on: sources_as_targets` each source domain takes the
        target's place: its model of synthetic speech, plus the mean of the
        *other* sources' vectors, decodes its real development strings. With
        `edited_target` the target's model, edited, decodes real development
        strings of the source domains and synthetic ones of the target. The
        least mean WER wins.

        Arguments
        ---------
        tau : TaskVector
            What is added to the target's model.

        Returns
        -------
        float
            The scale.
        dict of float to float
            `{scale: mean WER}`.
        """
        if self.hparams["choose_on"] == "edited_target":
            heard = [("real", source) for source in self.sources]
            heard.append(("synthetic", self.target))
            curves = [
                self.curve(self.base, tau, heard, "valid", self.chosen_on)
            ]
        else:
            curves = [
                self.curve(
                    self.pairs[source][1],
                    TaskVector.mean(
                        [self.vectors[s] for s in self.sources if s != source]
                    ),
                    [("real", source)],
                    "valid",
                    self.chosen_on,
                )
                for source in self.sources
            ]
        curve = {s: statistics.fmean(c[s] for c in curves) for s in curves[0]}
        return best_scale(curve), curve

    @property
    def chosen_on(self):
        """What the choice of the scale is called in tables and cards."""
        return CHOSEN_ON[self.hparams["choose_on"]]

    def curve(self, base, tau, heard, split, select_on):
        """Measure WER against scale, of a model plus a vector.

        Arguments
        ---------
        base : State
            The model's weights.
        tau : TaskVector
            What is added.
        heard : list of tuple of str
            `(side, domain)` of the strings that are decoded.
        split : str
            `"valid"` or `"test"`.
        select_on : str
            What a choice from this curve is to be called.

        Returns
        -------
        dict of float to float
            `{scale: mean WER over what is heard, in %}`.
        """
        data = {"/".join(key): self.held_out(*key, split) for key in heard}
        search = search_scale(
            self.hparams["model"],
            base,
            tau,
            lambda model: {key: self.brain.wer_on(data[key]) for key in data},
            [0.0, *self.hparams["scales"]],
            split=split,
            select_on=select_on,
            hopeless=None,
            enable_progress=False,
        )
        return {row["scale"]: row["wer"] for row in search.table}

    def edited(self, tau, scale):
        """Count the errors of the target's model plus a vector.

        Arguments
        ---------
        tau : TaskVector
            What is added.
        scale : float
            How much of it.

        Returns
        -------
        dict of str to float
            See `errors`.
        """
        state = tau.apply(self.base, scale, any_base=True)
        self.hparams["model"].load_state_dict(state)
        return self.errors()

    def errors(self):
        """Count the errors of the weights in place on real target strings.

        Returns
        -------
        dict of str to float
            See `count_errors`.
        """
        data = self.held_out("real", self.target, self.hparams["report_on"])
        references, hypotheses = self.brain.transcripts(data)
        own = set(self.hparams["domains"][self.target])
        return count_errors(references, hypotheses, own)

    def proof(self):
        """Apply each source vector to its own source: the real model again.

        Returns
        -------
        float
            Largest absolute difference over all weights and sources.
        """
        worst = 0.0
        for real, synthetic in self.pairs.values():
            rebuilt = syn2real(synthetic, [(real, synthetic)], scale=1.0)
            for name, tensor in rebuilt.items():
                difference = (tensor.double() - real[name].double()).abs()
                worst = max(worst, float(difference.max()))
        return worst


def count_errors(references, hypotheses, own):
    """Count word errors, those in a domain's own words apart.

    Arguments
    ---------
    references, hypotheses : list of str
        Transcripts.
    own : set of str
        The domain's own words.

    Returns
    -------
    dict of str to float
        In %: `wer`; `own_words` and `shared_words`, the share of these
        reference words that was substituted or deleted (insertions belong to
        no word and are in `wer` alone).

    Example
    -------
    >>> count_errors(["ONE SIX SIX SIX"], ["TWO SIX SIX SIX"], {"ONE"})
    {'wer': 25.0, 'own_words': 100.0, 'shared_words': 0.0}
    """
    output = process_words(references, hypotheses)
    wrong, total = {True: 0, False: 0}, {True: 0, False: 0}
    for words, chunks in zip(output.references, output.alignments):
        for chunk in chunks:
            for word in words[chunk.ref_start_idx : chunk.ref_end_idx]:
                total[word in own] += 1
                wrong[word in own] += chunk.type != "equal"
    return {
        "wer": 100.0 * output.wer,
        "own_words": 100.0 * wrong[True] / max(1, total[True]),
        "shared_words": 100.0 * wrong[False] / max(1, total[False]),
    }


def best_scale(curve):
    """Return the scale with the least WER, of equals the smallest.

    Arguments
    ---------
    curve : dict of float to float
        `{scale: WER}`.

    Returns
    -------
    float
        The scale.

    Example
    -------
    >>> best_scale({0.0: 9.0, 0.5: 7.0, 1.0: 7.0})
    0.5
    """
    return min(curve, key=lambda scale: (curve[scale], scale))
