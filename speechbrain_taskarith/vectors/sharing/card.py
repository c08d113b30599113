"""A card beside every output: where these weights come from.

One Markdown file; its front matter holds the same for programs and hubs.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

import speechbrain_taskarith
from speechbrain_taskarith.utils.files import now
from speechbrain_taskarith.utils.hub.cards import (
    KEY,
    card_path,
    hub_entries,
    model_index,
    read_card,
    write_card,
)
from speechbrain_taskarith.vectors.states.torch_files import TORCH_SUFFIXES

_TASK = "automatic-speech-recognition"


@dataclass
class ModelCard:
    """Provenance of weights that were made from other weights.

    Arguments
    ---------
    title : str
        First line of the card.
    parents : list of dict
        What it was made from, see `parent`.
    rule : object or dict
        The rule, or its description.
    scale : float, dict or list
        What the vectors were multiplied by.
    wer : list of dict
        Rows of a table of word error rates, e.g. `{"row": "edited", "wer":
        4.2, "split": "test"}`; or `{name: number}`. Rows with a
        `"dataset"` are this model's own results: the hub shows them in its
        table (`model-index`).
    selected_on, fingerprint : str or None
        What the scale was chosen on; fingerprint of the weights that the
        card lies beside.
    notes : list of str
        What a user should know.
    date : str
        UTC, ISO 8601; now by default.
    versions : dict
        Of the packages that made it; those installed by default.
    relation : str or None
        What it is to the models that it was made from: `"merge"`,
        `"finetune"`, or `"adapter"`, which needs its base.
    license : str or None
        As the hub writes it, e.g. `"apache-2.0"`.
    language : str, list of str or None
        ISO 639 codes of what it recognises.
    tags : list of str
        Further ones for the hub's search.

    Example
    -------
    >>> card = ModelCard(
    ...     "Edited",
    ...     parents=[{"role": "base", "path": "us.ckpt", "fingerprint": "ab"}],
    ...     scale=0.4,
    ...     wer={"german": 5.0},
    ...     selected_on="valid",
    ... )
    >>> print(card.to_markdown())
    # Edited
    ...
    | name | wer |
    | --- | --- |
    | german | 5.00 |
    ...
    """

    title: str = "Edited model"
    parents: list = field(default_factory=list)
    rule: object = None
    scale: object = None
    wer: object = field(default_factory=list)
    selected_on: str | None = None
    fingerprint: str | None = None
    notes: list = field(default_factory=list)
    date: str = field(default_factory=now)
    versions: dict = field(default_factory=lambda: _versions())
    relation: str | None = "merge"
    license: str | None = None
    language: object = None
    tags: list = field(default_factory=list)

    def __post_init__(self):
        if self.rule is not None and not isinstance(self.rule, dict):
            if not hasattr(self.rule, "describe"):
                raise TypeError(
                    "rule: expected a Rule or its description, got "
                    f"{type(self.rule).__name__}"
                )
            self.rule = self.rule.describe()
        if isinstance(self.wer, dict):
            self.wer = [{"name": k, "wer": v} for k, v in self.wer.items()]
        if isinstance(self.notes, str):
            self.notes = [self.notes]
        self.parents = [dict(parent) for parent in self.parents]

    @staticmethod
    def parent(role, source):
        """Describe a parent.

        Arguments
        ---------
        role : str
            `"base"`, `"fine-tuned"`, `"vector"`, ...
        source : State or TaskVector
            The parent.

        Returns
        -------
        dict
            `{"role", "path", "fingerprint"}`; the path as given.
        """
        if hasattr(source, "fingerprint"):
            return {
                "role": role,
                "path": source.label,
                "fingerprint": source.fingerprint,
            }
        found = {"role": role, "base_fingerprint": source.base_fingerprint}
        for key, name in (
            ("finetuned", "path"),
            ("finetuned_fingerprint", "fingerprint"),
        ):
            if key in source.metadata:
                found[name] = source.metadata[key]
        return found

    @classmethod
    def of_edits(cls, editor, **fields):
        """Make the card of a `SequentialEditor`'s present state.

        One parent is the base, one every edit in force. Further `**fields`
        are as `ModelCard` takes them.
        """
        edits = editor.log
        parents = [{"role": "base", "fingerprint": editor.base_fingerprint}]
        parents += [
            {
                "role": f"edit {edit.name!r}",
                "vector_sha256": edit.sha256,
                "encoding": edit.encoding,
                "scale": edit.scale,
                "rule": edit.rule,
                "exact": edit.exact,
            }
            for edit in edits
        ]
        selections = dict.fromkeys(e.selected_on for e in edits)
        given = {
            "title": "Sequentially edited model",
            "parents": parents,
            "rule": edits[-1].rule if edits else None,
            "scale": [edit.scale for edit in edits],
            "selected_on": "; ".join(filter(None, selections)) or None,
            "fingerprint": editor.fingerprint,
        }
        if not all(edit.exact for edit in edits):
            given["notes"] = [
                "An earlier edit was dropped or moved: later vectors were "
                "applied to another state than they were learned on."
            ]
        return cls(**{**given, **fields})

    @classmethod
    def load(cls, output):
        """Read the card of an output, where `save` has put it.

        Arguments
        ---------
        output : str or pathlib.Path
            The weights' file or folder, not the card's.

        Returns
        -------
        ModelCard
            With all that was saved.

        Raises
        ------
        FileNotFoundError
            No card of this plugin there.
        ValueError
            Its front matter is damaged.
        """
        content = read_card(output)
        names = [entry.name for entry in dataclasses.fields(cls)]
        if "parents" not in content:
            raise FileNotFoundError(
                f"{card_path(output)}: no card of this plugin; what is made "
                "by `taskarith` or saved by ModelCard.save has one"
            )
        return cls(**{k: v for k, v in content.items() if k in names})

    def to_dict(self):
        """Return the fields (see `ModelCard`) in plain types.

        Numbers that are not finite become None.
        """
        text = json.dumps(dataclasses.asdict(self), default=_plain)
        return json.loads(text, parse_constant=lambda _: None)

    def provenance(self):
        """Return what a weights file's own metadata holds, as `to_dict` does.

        Parents, rule, scale, selection, date and versions.
        """
        keys = ("parents", "rule", "scale", "selected_on", "date", "versions")
        content = self.to_dict()
        return {key: content[key] for key in keys if content[key]}

    def to_markdown(self):
        """Return the card as text: a heading, facts, tables; see `ModelCard`."""
        card = self.to_dict()
        lines = [f"# {_text(card['title'])}", ""]
        for label, key in (
            ("Made", "date"),
            ("Rule", "rule"),
            ("Scale", "scale"),
            ("Chosen on", "selected_on"),
            ("Fingerprint", "fingerprint"),
        ):
            if text := _text(card[key]):
                lines.append(f"- {label}: {text}")
        versions = [
            {"package": k, "version": v} for k, v in card["versions"].items()
        ]
        for heading, content in (
            ("Made from", _table(card["parents"])),
            ("Word error rates", _table(card["wer"])),
            ("Notes", [f"- {note}" for note in card["notes"]]),
            ("Versions", _table(versions)),
        ):
            if content:
                lines += ["", f"## {heading}", "", *content]
        return "\n".join(lines) + "\n"

    def save(self, output):
        """Write the card of an output, atomically.

        Arguments
        ---------
        output : str or pathlib.Path
            The weights' file or folder. A folder gets `README.md`, as the
            hub shows it; beside a file `x.ckpt` stands `x.ckpt.md`. What
            `save_state` has noted there of a torch file stays.

        Returns
        -------
        pathlib.Path
            The card.
        """
        output, content = Path(output), self.to_dict()
        library = KEY
        if output.is_dir():
            is_hugging_face = (output / "config.json").is_file()
            library = "transformers" if is_hugging_face else "speechbrain"
        elif output.suffix in TORCH_SUFFIXES:
            content = {**read_card(output), **content}
        front = self._hub_entries(library) | {KEY: content}
        return write_card(card_path(output), front, self.to_markdown())

    def _hub_entries(self, library):
        """Return what the hub reads at the head of the card."""
        roles = ("base",) if self.relation == "adapter" else None
        bases = [
            parent.get("path")
            for parent in self.parents
            if roles is None or parent.get("role") in roles
        ]
        tags = [KEY, *([self.relation] if self.relation else ()), *self.tags]
        found = hub_entries(
            base_model=bases,
            relation=self.relation,
            library=library,
            tags=tags,
            license=self.license,
            language=self.language,
        )
        results = [
            {"metric": "wer", "label": "WER (%)", "value": value, **row}
            for row in self.to_dict()["wer"]
            if isinstance(value := row.get("wer"), (int, float))
            and row.get("dataset")
        ]
        return found | model_index(self.title, results, _TASK)


def _versions():
    found = {"python": platform.python_version()}
    found["speechbrain_taskarith"] = speechbrain_taskarith.__version__
    for package in ("speechbrain", "torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _plain(value):
    is_number = hasattr(value, "item") and getattr(value, "ndim", 0) == 0
    return value.item() if is_number else str(value)


def _table(rows):
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, ["---"] * len(columns)]
    cells += [[row.get(column) for column in columns] for row in rows]
    texts = [[_text(value, "{:.2f}") for value in line] for line in cells]
    return [f"| {' | '.join(line)} |" for line in texts]


def _text(value, number="{}"):
    """Return a rule, a scale, or another value as one line."""
    if value in (None, {}):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number.format(value)
    if isinstance(value, dict) and "rule" in value:
        arguments = ", ".join(
            f"{k}={_text(v) if isinstance(v, dict) and 'rule' in v else v}"
            for k, v in value.items()
            if k not in ("rule", "module")
        )
        value = f"{value['rule']}({arguments})"
    elif isinstance(value, dict):
        value = ", ".join(f"`{key}`: {entry}" for key, entry in value.items())
    elif isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
