"""The log of a sequence of edits: what was applied, when, with what hash.

One line of JSON for each act, appended and flushed before the act counts: an
act costs the same however long the sequence is. What the log does not hold
never happened, so a process killed in between has lost nothing that was
reported done. Each line carries a check of itself and all lines before it;
how many were written stands beside the log.
"""

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from speechbrain_taskarith.utils.files import (
    atomic_write,
    fsync_directory,
    now,
    read_json,
    write_at,
    write_error,
)

LOG_NAME = "edits.jsonl"
# One file that was replaced whole at every act, in format version 1.
OLD_LOG_NAME = "edits.json"
# How many lines were written, and the check of the last: a log that lost whole
# lines is whole by itself.
LAST_NAME = "edits.last"
_FORMAT = "speechbrain_taskarith edit log"
_VERSION = 2
logger = logging.getLogger(__name__)

# Each line starts with this and 16 digits.
_CHECK = '{"check": "'


@dataclass(frozen=True)
class Edit:
    """One edit of a sequence, as the log stores it.

    Arguments
    ---------
    name : str
        What was learned, unique in the sequence.
    vector : str
        The stored vector's file, relative to the editor's folder.
    sha256, encoding : str
        Hash of that file, and how the vector is stored in it.
    scale : float or dict
        What the stored vector is multiplied by.
    rule : dict
        The rule that made the stored vector, in plain types.
    learned_on, state : str
        Fingerprints: of the state that the model was fine-tuned from, and of
        the state after this edit.
    exact : bool
        True where the vector was applied to the state it was learned on.
        False marks an approximation: an earlier edit was dropped or moved.
    when, note : str
        Time of learning, UTC, ISO 8601; and free text.
    selected_on : str or None
        What the scale was chosen on, where it was chosen.
    started_from : str or None
        The type that the state was rounded to before it was fine-tuned and
        subtracted, see `SequentialEditor.learn`; None: it was not.
    """

    name: str
    vector: str
    sha256: str
    encoding: str
    scale: float | dict
    rule: dict
    learned_on: str
    state: str
    exact: bool
    when: str
    selected_on: str | None = None
    note: str = ""
    started_from: str | None = None

    def to_dict(self):
        """Return the fields as plain types, see `Edit`."""
        return asdict(self)


_EDIT_KINDS = dict.fromkeys(("name", "vector", "sha256", "encoding"), str)
_EDIT_KINDS |= dict.fromkeys(("learned_on", "state", "when", "note"), str)
_EDIT_KINDS |= {"scale": (int, float, dict), "rule": dict, "exact": bool}


def slug(name):
    """Turn an edit's name into a short piece of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40] or "edit"


def has_log(folder):
    """Tell whether a folder holds a sequence of edits."""
    names = (LOG_NAME, OLD_LOG_NAME)
    return any((Path(folder) / name).is_file() for name in names)


@dataclass
class EditLog:
    """The content of `edits.jsonl`.

    The first line holds the settings, each further one an act. An act that
    changes the states after other edits says so under `changed`:
    `{name: [state, exact]}`.
    """

    # {"file" | "path", "fingerprint", "from"} of the state that the sequence
    # starts from; `file` is relative to the folder, `path` lies outside it.
    base: dict
    # The editor's rule, scale (see `SequentialEditor`) and encoding, in plain
    # types, and the patterns of the parameters that are edited.
    rule: dict
    schedule: object
    encoding: str
    include: list
    exclude: list
    # "float32": states are kept so where the base holds half precision.
    # "base": in the base's types, as in format version 1.
    precision: str = "float32"
    # Copies of the last states that the folder keeps, at most.
    copies: int = 2
    # `Edit`s in force, in order, and all that was done, undone edits too.
    edits: list = field(default_factory=list)
    history: list = field(default_factory=list)
    # What was undone since the last edit was learned: [(index, Edit), ...].
    undone: list = field(default_factory=list)

    # Of the file: name, bytes that count, check of its last line.
    path, _size, _check, _lines = None, 0, "", 0
    # A killed process has written a part of an act, which does not count.
    cut_short = False

    def __post_init__(self):
        self._handed_out = {}

    def start(self, folder):
        """Write the log of a new sequence."""
        self.path = Path(folder) / LOG_NAME
        self.history = self.history or [{"action": "start", "when": now()}]
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        del content["undone"]
        line, self._check = _line("", content)
        self.path.with_name(LAST_NAME).unlink(missing_ok=True)
        with atomic_write(self.path) as stream:
            stream.write(line)
        self._size, self._lines = len(line), 1
        self._note_last()

    def append(self, **act):
        """Put an act into force: the last step of a change."""
        act["when"] = now()
        line, check = _line(self._check, act)
        with open(self.path, "r+b", buffering=0) as stream:
            try:
                write_at(stream.fileno(), line, self._size)
                os.fsync(stream.fileno())
            except OSError as error:
                os.ftruncate(stream.fileno(), self._size)
                raise write_error(error, self.path) from error
        self._apply(act)
        self._size, self._check = self._size + len(line), check
        self._lines += 1
        self._note_last()

    def repair(self):
        """Remove what a killed process wrote of an act that never counted."""
        if self.cut_short:
            os.truncate(self.path, self._size)
            self.cut_short = False
        self._note_last()

    def _note_last(self):
        """Note how many lines were written; the act is in force already.

        A note that lags behind, as after a kill, only shows less.
        """
        text = f"{self._lines:012d} {self._check}\n".encode()
        try:
            flags = os.O_WRONLY | os.O_CREAT
            descriptor = os.open(self.path.with_name(LAST_NAME), flags, 0o666)
            try:
                os.pwrite(descriptor, text, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("%s: %s", LAST_NAME, error)

    def upgrade(self, folder):
        """Write the log of a sequence in format version 1 as this version."""
        old = Path(folder) / OLD_LOG_NAME
        if self.path == old:
            self.start(folder)
        if old.exists():
            old.unlink()
            fsync_directory(folder)

    @classmethod
    def read(cls, folder):
        """Read and check the log of a folder; errors name the file."""
        path, old = Path(folder) / LOG_NAME, Path(folder) / OLD_LOG_NAME
        if not has_log(folder):
            raise FileNotFoundError(
                f"{path}: there is no edit log. Start one with "
                "SequentialEditor(base, rule, folder), or give its folder"
            )
        try:
            if not path.is_file():
                path = old
                content = _checked(path, read_json(path), version=1)
                log = cls._of(content | {"precision": "base"})
                log.path = path
                return log
            # Before the log, to which others may add meanwhile.
            last = _read_last(Path(folder) / LAST_NAME)
            log, size, check, checks = None, 0, "", []
            # What is not ended by a newline was cut short by a kill.
            *lines, rest = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                start, text = line[: len(_CHECK) + 19], line[len(_CHECK) + 19 :]
                check = _check_of(check, text)
                if start.decode(errors="replace") != f'{_CHECK}{check}", ':
                    raise ValueError(
                        _altered(path, f"line {number} is damaged")
                    )
                content = json.loads(b"{" + text)
                if log is None:
                    log = cls._of(_checked(path, content, _VERSION))
                else:
                    log._apply(content)
                size += len(line) + 1
                checks.append(check)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"an entry is missing or unknown ({error})"
            raise ValueError(_altered(path, what)) from None
        if log is None:
            raise ValueError(_altered(path, "its first line is not whole"))
        if last and checks[last[0] - 1 : last[0]] != [last[1]]:
            what = f"has {len(checks)} whole lines; {LAST_NAME} knows of "
            what += f"{last[0]}, with the check {last[1]}"
            raise ValueError(_altered(path, what))
        log.path, log._size, log._check = path, size, check
        log._lines = len(checks)
        log.cut_short = bool(rest)
        return log

    @classmethod
    def _of(cls, content):
        known = {f.name for f in fields(cls)} - {"undone"}
        values = {k: v for k, v in content.items() if k in known}
        values["edits"] = [Edit(**entry) for entry in values["edits"]]
        for one, kinds in (
            (values, {"base": dict, "rule": dict, "history": list}),
            (values, {"include": list, "exclude": list, "encoding": str}),
            (values["base"], {"fingerprint": str}),
            (
                values["base"],
                {"file" if "file" in values["base"] else "path": str},
            ),
            *((asdict(edit), _EDIT_KINDS) for edit in values["edits"]),
        ):
            for key, kind in kinds.items():
                if not isinstance(one[key], kind):
                    raise TypeError(f"{key} is {one[key]!r}")
        return cls(**values)

    def _apply(self, act):
        """Do to the edits what an act says."""
        kind, edits = act["action"], self.edits
        if kind == "learn":
            edits.append(Edit(**act["edit"]))
            self.undone.clear()
        elif kind == "undo":
            (index,) = [i for i, e in enumerate(edits) if e.name == act["name"]]
            self.undone.append((index, edits.pop(index)))
        elif kind == "redo":
            edits.insert(*self.undone.pop())
        elif kind == "reorder":
            by_name = {edit.name: edit for edit in edits}
            edits[:] = [by_name[name] for name in act["order"]]
            self.undone.clear()
        elif kind == "hand out":
            self._handed_out.setdefault(act["state"], []).append(act["dtype"])
        else:
            raise KeyError(f"action {kind!r}")
        if changed := act.get("changed"):
            for index, edit in enumerate(edits):
                if edit.name in changed:
                    state, exact = changed[edit.name]
                    edits[index] = replace(edit, state=state, exact=exact)
        self.history.append(act)

    def handed_out(self, state):
        """Return in which narrower types a state was given away."""
        return self._handed_out.get(state, [])


def _line(previous, content):
    """Return a line of the log and its check."""
    text = json.dumps(content, allow_nan=False)[1:].encode()
    check = _check_of(previous, text)
    return f'{_CHECK}{check}", '.encode() + text + b"\n", check


def _check_of(previous, text):
    return hashlib.sha256(previous.encode() + text).hexdigest()[:16]


def _read_last(path):
    """Return number and check of the last line written; None: not noted."""
    try:
        count, check = path.read_bytes().decode().split()
        return int(count), check
    except FileNotFoundError:  # written by an earlier version
        return None
    except ValueError:
        raise ValueError(
            f"{path}: is damaged; restore it from a copy, or remove it if "
            f"{LOG_NAME} is known to hold all acts"
        ) from None


def _checked(path, content, version):
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: is JSON, but not an edit log")
    if content.get("version") != version:
        raise ValueError(
            f"{path}: written in version {content.get('version')} of the "
            f"format, this package reads versions 1 to {_VERSION}; use the "
            "package that wrote it"
        )
    return content


def _altered(path, what):
    return f"{path}: {what}; the log was altered. Restore it from a copy"
