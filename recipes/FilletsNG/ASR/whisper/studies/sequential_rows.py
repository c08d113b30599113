"""The rows of the table of sequential editing: how each learns a domain."""

import dataclasses
from dataclasses import dataclass

from speechbrain_taskarith.vectors import (
    TIES,
    TSVM,
    IsoC,
    LinearAverage,
    ModelStock,
    TaskArithmetic,
)
from speechbrain_taskarith.vectors.lifelong.memory import Replay
from studies.lineage import Edited, Tuned
from studies.lines import write_csv

# Of all rows whose knob is another; fine_tuning_same_lr is what they are to be
# compared with where fine-tuning chooses another rate.
LR = 3e-5


@dataclass(frozen=True)
class Row:
    """Fine-tuning; the other rows override what they do differently.

    A row only says how a model is made: nothing is trained or measured before
    somebody asks for it, save where a row chooses on development lines.

    Arguments
    ---------
    lr : float
        Learning rate.
    knob : str or None
        The attribute that is tuned, on as many values in every row.
    values : tuple
        What is tried.
    """

    lr: float = LR
    knob: str | None = None
    values: tuple = ()

    #: Whether lines of earlier domains are trained on again.
    uses_old_data = False
    #: Whether only the model at the end is made.
    only_last = False
    #: Whether something is chosen at every step, too.
    chooses = False
    #: How many domains the tuned step has behind it.
    tuned_after = 0

    def at(self, value):
        """Return the row at another value of its knob."""
        return dataclasses.replace(self, **{self.knob: value})

    def tuned(self, step, start=None, **options):
        """Return the training of the step's domain."""
        options = {"train_csv": step.lines[step.domain], **options}
        return Tuned(
            start or step.before,
            step.domain,
            lr=f"{self.lr:.6f}",
            seed=step.seed,
            **options,
        )

    def learn(self, step):
        """Return the model after the step's domain."""
        return self.tuned(step)


@dataclass(frozen=True)
class Scaled(Row):
    """The rule over what one fine-tuning added; scale None: 1 / t."""

    scale: float | None = 0.4
    density: float | None = None

    def rule(self, step):
        """Return the rule of a step."""
        scale = self.scale
        if scale is None:
            scale = 1.0 / (len(step.seen) + 2)  # the original is the first
        if self.density is None:
            return TaskArithmetic(scale=scale)
        return TIES(density=self.density, scale=scale)

    def learn(self, step):
        """As `Row.learn`."""
        return Edited(step.before, self.rule(step), [self.tuned(step)])


@dataclass(frozen=True)
class Chosen(Row):
    """A scale chosen at every step, on development lines.

    `on`: "new", the least WER on the new domain; "new_and_original", the least
    mean of that and of the original domain's. With `share`, the smallest scale
    with this share of what scale 1 gains on the new domain.
    """

    on: str = "new"
    share: float | None = None
    scales: tuple = (0.25, 0.5, 0.75, 1.0)
    chooses = True

    def learn(self, step):
        """As `Row.learn`."""
        tuned = self.tuned(step)
        edits = {
            scale: Edited(step.before, TaskArithmetic(scale=scale), [tuned])
            for scale in self.scales
        }
        domains = [step.domain]
        if self.on == "new_and_original":
            domains.append(step.original)
        wers = {s: step.dev_wer(edits[s], domains) for s in self.scales}
        if self.share is None:
            return edits[min(wers, key=wers.get)]
        before = step.dev_wer(step.before, domains)
        enough = before - self.share * (before - wers[max(wers)])
        # Where fine-tuning gains nothing, the smallest does.
        return edits[min(s for s, wer in wers.items() if wer <= enough)]


@dataclass(frozen=True)
class Method(Row):
    """A lifelong method of `train.py`; `strength` goes to its hparam."""

    method: str = ""
    strength: float | None = None
    remembers: bool = False

    def learn(self, step):
        """As `Row.learn`."""
        options = {"method": self.method}
        if self.strength is not None:
            options[f"{self.method}_strength"] = self.strength
        if self.remembers:
            last = [step.original, *step.seen][-1]
            options["remember"] = step.lines[last]
            options["remembers"] = step.before if step.seen else None
        return self.tuned(step, **options)


@dataclass(frozen=True)
class Replayed(Row):
    """Old lines take the places of some new ones: as many steps."""

    share: float = 0.25
    memory: int = 60
    uses_old_data = True

    def learn(self, step):
        """As `Row.learn`."""
        replay = Replay(self.memory, self.share, step.seed)
        for domain in (step.original, *step.seen):
            replay.consolidate(None, step.rows[domain], None)
        new, size = step.rows[step.domain], step.batch_size
        mixed = []
        for draw, first in enumerate(range(0, len(new), size)):
            batch = new[first : first + size]
            old = replay.extra_items(len(batch), draw)
            mixed += batch[: len(batch) - len(old)]
            mixed += [
                r | {"ID": f"{r['ID']}/{draw}-{n}"} for n, r in enumerate(old)
            ]
        after = "_".join(step.seen)
        name = f"replay/{step.domain}_after_{after}_{self.share}.csv"
        return self.tuned(step, train_csv=write_csv(step.folder / name, mixed))


@dataclass(frozen=True)
class Joint(Row):
    """Trained on all lines of all domains at once, the original too."""

    uses_old_data = True
    only_last = True

    def learn(self, step):
        """As `Row.learn`."""
        domains = sorted([step.original, *step.seen, step.domain])
        rows = [row for domain in domains for row in step.rows[domain]]
        lines = write_csv(step.folder / "joint.csv", rows)
        return Tuned(
            step.base,
            "joint",
            lr=f"{self.lr:.6f}",
            seed=step.seed,
            train_csv=lines,
        )


@dataclass(frozen=True)
class Merged(Row):
    """Each domain is tuned from the base; all so far are merged."""

    rule: type = LinearAverage
    scale: float | None = None
    density: float | None = None
    tuned_after = 1

    def learn(self, step):
        """As `Row.learn`."""
        trainings = [
            self.tuned(
                dataclasses.replace(step, domain=domain), start=step.base
            )
            for domain in (*step.seen, step.domain)
        ]
        settings = {"scale": self.scale, "density": self.density}
        settings = {k: v for k, v in settings.items() if v is not None}
        rule = self.rule(**settings)
        if len(trainings) < rule.min_vectors:
            # One model's vector has no other to be merged with.
            return trainings[0]
        return Edited(step.base, rule, trainings)


RATES = (1e-5, 3e-5, 5e-5)
SCALES = (0.3, 0.6, 1.0)

#: All rows, and what is tried of each: three values of one knob.
ROWS = {
    "fine_tuning": Row(knob="lr", values=RATES),
    "task_arithmetic_paper": Scaled(scale=0.4),
    "ties_paper": Scaled(scale=0.6, density=0.5),
    "task_arithmetic": Scaled(knob="scale", values=(0.25, 0.5, 0.75)),
    "ties": Scaled(density=0.5, knob="scale", values=(0.3, 0.6, 0.9)),
    "chosen_new": Chosen(),
    "chosen_share": Chosen(share=0.9, knob="share", values=(0.7, 0.8, 0.9)),
    "chosen_new_and_original": Chosen(on="new_and_original"),
    "merge_task_arithmetic": Merged(
        rule=TaskArithmetic, knob="scale", values=SCALES
    ),
    "merge_ties": Merged(
        rule=TIES, density=0.5, knob="scale", values=(0.6, 1.0, 1.4)
    ),
    "merge_tsvm": Merged(rule=TSVM, knob="scale", values=SCALES),
    "merge_isoc": Merged(rule=IsoC, knob="scale", values=SCALES),
    "merge_model_stock": Merged(
        rule=ModelStock, knob="scale", values=(1.0, 1.4, 1.8)
    ),
    # Rivals
    "averaging_half": Scaled(scale=0.5, knob="lr", values=RATES),
    "averaging_one_over_t": Scaled(scale=None, knob="lr", values=RATES),
    "mean_of_models": Merged(knob="lr", values=RATES),
    "encoder_only": Method(method="encoder_only", knob="lr", values=RATES),
    "ewc": Method(
        method="ewc", remembers=True, knob="strength", values=(1e3, 1e4, 1e5)
    ),
    "lwf": Method(method="lwf", knob="strength", values=(0.25, 1.0, 4.0)),
    "replay": Replayed(knob="share", values=(0.125, 0.25, 0.5)),
    "fine_tuning_same_lr": Row(),
    "joint": Joint(),
}

#: What editing is compared with.
RIVALS = (
    "averaging_half",
    "averaging_one_over_t",
    "mean_of_models",
    "encoder_only",
    "ewc",
    "lwf",
    "replay",
    "fine_tuning_same_lr",
    "joint",
)
