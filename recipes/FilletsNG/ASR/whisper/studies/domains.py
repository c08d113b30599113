"""The lines of several domains: what is drawn for training, what is tested."""

import functools
import random
import re
from dataclasses import dataclass
from pathlib import Path

from speechbrain_taskarith.metrics import wer
from speechbrain_taskarith.utils.files import sha256_of
from studies.lines import (
    SPLITS,
    check_name,
    check_splits,
    read_csv,
    tell_long,
)

DIGITS = "zero one two three four five six seven eight nine".split()


@dataclass(frozen=True)
class Domain:
    """A name, and the manifests of a corpus: `{}` stands for the split."""

    name: str
    pattern: str

    @classmethod
    def parse(cls, text):
        """Read `NAME=PATTERN`, as a command line gives it."""
        name, _, pattern = text.partition("=")
        if not name or "{}" not in pattern:
            raise ValueError(
                f"{text!r}: expected NAME=PATTERN, with {{}} where train, "
                "valid and test stand in the manifests' names, e.g. "
                "cs=corpus/cs_{}.csv"
            )
        check_name(name)
        return cls(name, pattern)

    @classmethod
    def parse_test(cls, text):
        """Read `NAME=MANIFEST`, of lines that are only tested on."""
        name, _, manifest = text.partition("=")
        if not name or not manifest:
            raise ValueError(
                f"{text!r}: expected NAME=MANIFEST, e.g. fr=stamps/fr_test.csv"
            )
        check_name(name)
        return cls(name, manifest)

    def read(self, split, longest=None):
        """Return a split's rows, not longer than `longest` seconds."""
        path = self.pattern.format(split)
        rows = read_csv(path)
        for row in rows:
            # Of several domains together, each keeps its own names.
            row["ID"] = f"{self.name}/{row['ID']}"
        rows = [r for r in rows if longest is None or _seconds(r) <= longest]
        if not rows:
            raise ValueError(
                f"{path}: domain {self.name}: no line of at most {longest} s"
            )
        return rows

    def check(self, longest, splits=SPLITS):
        """Refuse lines that are in two splits; count those left out.

        Returns `{split: rows}`.
        """
        rows = {split: self.read(split) for split in splits}
        check_splits(self.name, rows)
        for split, found in rows.items():
            tell_long(self.pattern.format(split), found, longest)
        return rows

    def draw(self, split, count, seed, longest=None):
        """Return `count` lines of a split, or all where it has fewer."""
        rows = self.read(split, longest)
        return random.Random(f"{seed}/{self.name}").sample(
            rows, min(count, len(rows))
        )


def _seconds(row):
    return float(row["duration"])


def name_of_lines(path):
    """Return a short name of a manifest's content."""
    return _digest(str(path), Path(path).stat().st_mtime_ns)


@functools.cache
def _digest(path, changed):
    del changed  # at another time: read it again
    return sha256_of(path)[:12]


def one_by_one(text):
    """Write each digit of a scored text as a word of its own.

    Whisper's normaliser makes one number of several digits in words, "731",
    and another of the same digits in numerals, "7 3 one".
    """
    for number, word in enumerate(DIGITS):
        text = re.sub(rf"\b{word}\b", str(number), text)
    return " ".join(re.sub(r"(\d)", r" \1 ", text).split())


def word_errors(references, hypotheses):
    """Count errors; where all references are digits, digit by digit."""
    single = {key: one_by_one(text) for key, text in references.items()}
    if all(re.fullmatch(r"[\d ]+", text) for text in single.values()):
        references = single
        hypotheses = {k: one_by_one(text) for k, text in hypotheses.items()}
    return wer(references, hypotheses)


class Tests:
    """Errors of models on the held-out lines of domains, measured once.

    Arguments
    ---------
    models : lineage.Models
        Makes the weights, where something was not measured before.
    measure : measure.Measure
        Recognises the lines.
    lines : dict
        `{(domain, split): manifest}`.
    """

    def __init__(self, models, measure, lines):
        self.models, self.measure, self.lines = models, measure, lines

    def errors(self, model, domain, split):
        """Return the `WERReport` of a model on a domain."""
        manifest = self.lines[domain, split]
        found = self.measure(
            {"model": model.name, "lines": name_of_lines(manifest)},
            lambda: self.models.state(model),
            manifest,
        )
        return word_errors(found["references"], found["hypotheses"])

    def wer(self, model, domain, split):
        """Return the WER in %."""
        return self.errors(model, domain, split).wer

    def mean_wer(self, model, domains, split):
        """Return the mean of the domains' WERs."""
        return sum(self.wer(model, d, split) for d in domains) / len(domains)
