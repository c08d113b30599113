"""The folder of a sequence of edits: base, vectors, states, log, lock."""

import logging
from pathlib import Path

import torch

from speechbrain_taskarith.utils.files import remove_leftovers, sha256_of
from speechbrain_taskarith.utils.patterns import as_tuple, fitting, select
from speechbrain_taskarith.vectors.checks import all_finite
from speechbrain_taskarith.vectors.editing.copies import StateCopies
from speechbrain_taskarith.vectors.editing.lock import FolderLock
from speechbrain_taskarith.vectors.editing.log import (
    EditLog,
    has_log,
    slug,
)
from speechbrain_taskarith.vectors.editing.precision import (
    cast,
    narrows,
    plain_type,
    types_of,
    widened,
)
from speechbrain_taskarith.vectors.states.readers import as_state, open_state
from speechbrain_taskarith.vectors.states.state import short
from speechbrain_taskarith.vectors.states.writers import save_state
from speechbrain_taskarith.vectors.task_vector import TaskVector

_VECTORS, _STATES = "vectors", "states"

logger = logging.getLogger(__name__)


class EditFolder:
    """What a `SequentialEditor` stores on the disk.

    Only what the log names counts, and the log is written last: that is all
    there is to surviving a kill. The copies of states save time only.
    """

    def __init__(self, path, lock, log=None):
        self.path = Path(path)
        self.lock = lock
        self.log = EditLog.read(self.path) if log is None else log
        self.copies = StateCopies(self.path / _STATES, self.log.copies)

    @classmethod
    def start(cls, path, base, keep_base, **settings):
        """Begin a sequence; `settings` are fields of the `EditLog`."""
        path = Path(path)
        if has_log(path):
            raise FileExistsError(
                f"{path}: holds a sequence of edits already. Go on with "
                "SequentialEditor.resume(folder), or use another folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(path)
        try:
            log = EditLog(base=_store_base(path, base, keep_base), **settings)
            log.start(path)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, log)

    @classmethod
    def reopen(cls, path, read_only=False):
        """Open a folder that holds a sequence."""
        # Before the lock, so that a wrong path leaves no lock file behind.
        EditLog.read(path)
        lock = None if read_only else FolderLock(path)
        try:
            folder = cls(path, lock)
            folder._check_files()
            if folder.log.cut_short:
                logger.warning(
                    "%s: a process was killed while it wrote the last act, "
                    "which is not in force",
                    folder.log.path,
                )
            if not read_only:
                folder.log.upgrade(folder.path)
                folder.log.repair()
                folder.sweep()
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return folder

    def check_writable(self):
        """Raise unless this process may edit here."""
        if self.lock is None:
            raise RuntimeError(
                f"{self.path}: this editor was opened for reading; open it "
                "with SequentialEditor.resume(folder)"
            )
        self.lock.check()

    def base(self):
        """Open the base and check that it is the one of the log."""
        base, entry = self.open_base(), self.log.base
        if base.fingerprint != entry["fingerprint"]:
            raise ValueError(
                f"{base.label}: is not the base that {self.path} started from "
                f"(fingerprint {short(base.fingerprint)}, expected "
                f"{short(entry['fingerprint'])}); it was altered or replaced"
            )
        return base

    def open_base(self):
        """Open the base as it lies there, for a look at its names."""
        # A copy was written under the names that it is known by.
        return open_state(self._base_path(), as_stored="file" in self.log.base)

    def store(self, name, vector, encoding):
        """Write a vector; it does not count until it is committed.

        Returns its file (relative to the folder), that file's SHA-256, its
        encoding, and the vector as it is read back.
        """
        vector, encoding = to_store(vector, encoding)
        number = len(self.log.history)
        file = f"{_VECTORS}/{number:04d}-{slug(name)}.safetensors"
        path = self.path / file
        vector.save(path, encoding=encoding)
        return file, sha256_of(path), encoding, TaskVector.load(path)

    def vector(self, edit):
        """Read the vector of an edit and check its hash."""
        path = self._vector_path(edit)
        if sha256_of(path) != edit.sha256:
            raise ValueError(
                f"{path}: the vector of edit {edit.name!r} is not the one "
                "that was written (its hash differs from the log's); restore "
                "it from a copy of the folder"
            )
        return TaskVector.load(path)

    def present(self):
        """Return the state after the last edit.

        Its copy, or built from the nearest one before it, or from the base;
        compared with the log in either case.
        """
        edits = self.log.edits
        state, _, built = self.build(edits, len(edits))
        if built and self.lock is not None:
            self.keep(built)
        return state

    def build(self, edits, known, from_base=False):
        """Apply edits in order; the first `known` are as the log has them.

        Returns the last state, `{name: [state, exact]}` of the others as they
        are in this order, and `{fingerprint: State}` of the last ones built.
        """
        state, start = None, 0 if from_base else known
        while start and state is None:
            state = self.copies.get(edits[start - 1].state)
            start -= state is None
        if state is None:
            state = self.base()
            if self.log.precision != "base":
                state = widened(state)
        changed, built = {}, {}
        for number, edit in enumerate(edits[start:], start):
            before, vector = state.fingerprint, self.vector(edit)
            try:
                after = vector.apply(state, edit.scale, any_base=True)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{self.path}: edit {edit.name!r} cannot be applied here: "
                    f"{error.args[0]}"
                ) from None
            state = as_state(after)
            if number < known:
                self._check_logged(edit, state)
            else:
                changed[edit.name] = [
                    state.fingerprint,
                    edit.learned_on == before,
                ]
            built[state.fingerprint] = state
            while len(built) > max(1, self.log.copies):
                del built[next(iter(built))]
        return state, changed, built

    def keep(self, states):
        """Store copies of the last states, as far as they are given."""
        self.copies.keep(states, [edit.state for edit in self.log.edits])

    def types(self, dtype, state):
        """Return `{name: torch type}` for a state, see `types_of`."""
        base = self.base() if dtype == "base" else None
        return types_of(dtype, state, base)

    def give(self, state, dtype):
        """Return a state in a type; log that it was given away rounded."""
        types = self.types(dtype, state)
        given, name, found = cast(state, types), plain_type(dtype), None
        if self.lock is not None and narrows(state, types):
            found = state.fingerprint
            if name not in self.log.handed_out(found):
                self.lock.check()
                self.log.append(action="hand out", dtype=name, state=found)
        return given

    def commit(self, built, **act):
        """Put an act into force, and keep copies of the states it built."""
        undone = bool(self.log.undone)
        try:
            self.log.append(**{k: v for k, v in act.items() if v != {}})
        except BaseException:
            self.back_to_disk()
            raise
        self.keep(built)
        if undone or act["action"] != "learn":
            self.sweep()

    def back_to_disk(self):
        """After a failure: take the log from the disk, and sweep the rest."""
        # An interrupt may come right after the log was written.
        self.log = EditLog.read(self.path)
        self.log.repair()
        self.sweep()

    def sweep(self):
        """Remove what the log does not name: left-overs, old vectors."""
        vectors, log = self.path / _VECTORS, self.log
        for folder in (self.path, vectors, self.path / _STATES):
            remove_leftovers(folder)
        edits = [*log.edits, *(edit for _, edit in log.undone)]
        named = {Path(edit.vector).name for edit in edits}
        for file in vectors.glob("[0-9]*.safetensors"):
            if file.name not in named:
                file.unlink(missing_ok=True)

    def close(self):
        """Let others edit."""
        if self.lock is not None:
            self.lock.release()

    def _check_logged(self, edit, state):
        if state.fingerprint != edit.state:
            raise ValueError(
                f"{self.path}: after edit {edit.name!r} the weights are not "
                "those that the log reports, though all files are whole; was "
                "the log altered by hand?"
            )

    def _check_files(self):
        """Raise where a file is missing, or the log ends too early."""
        self._base_path()
        for edit in self.log.edits:
            self._vector_path(edit)
        # A killed process leaves one vector more than there are acts.
        last = len(self.log.history)
        for file in (self.path / _VECTORS).glob("[0-9]*-*.safetensors"):
            number = file.name.partition("-")[0]
            if number.isdigit() and int(number) > last:
                raise ValueError(
                    f"{self.log.path}: ends before the act that made "
                    f"{file.name}; restore the log from a copy of the folder"
                )

    def _base_path(self):
        entry = self.log.base
        path = self.path / entry["file"] if "file" in entry else entry["path"]
        if not Path(path).exists():
            raise FileNotFoundError(
                f"{path}: the base of the sequence in {self.path} is gone; "
                "restore it from a copy"
            )
        return path

    def _vector_path(self, edit):
        path = self.path / edit.vector
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the vector of edit {edit.name!r} is gone; restore "
                "it from a copy of the folder"
            )
        return path


def to_store(vector, encoding):
    """Return a vector as it is stored, and the encoding that `"auto"` means.

    That is the smaller of the exact ones, sparse or plain.
    """
    # Trimming leaves -0.0, which "sparse" would store as a number.
    zeros = {id(delta): delta + 0.0 for delta in vector.values()}
    deltas = {name: zeros[id(delta)] for name, delta in vector.items()}
    vector = TaskVector(deltas, vector.base_fingerprint, vector.metadata)
    if encoding == "auto":
        numbers = sum(delta.numel() for delta in deltas.values())
        kept = sum(int(torch.count_nonzero(d)) for d in deltas.values())
        smaller = numbers / 8 + 4 * kept < 4 * numbers
        encoding = "sparse" if smaller else "lossless"
    return vector, encoding


def check_finite(state, label, include=("*",), exclude=()):
    """Raise where weights that are edited hold NaN or infinity."""
    # A pattern may be meant for the fine-tuned model alone.
    chosen = (
        [p for p in as_tuple(patterns) if fitting(state, p)]
        for patterns in (include, exclude)
    )
    for name in select(state, *chosen):
        if state.info(name).floating and not all_finite(state[name]):
            raise ValueError(
                f"{label}: {name!r} holds NaN or infinity; nothing was edited"
            )


def _store_base(folder, base, keep_base):
    """Copy the base or note its path; return its entry in the log."""
    entry = {"fingerprint": base.fingerprint, "from": base.label}
    if keep_base == "reference":
        if base.path is None:
            raise ValueError(
                "keep_base='reference' needs a base that is a path; weights "
                "in memory can only be copied"
            )
        return {"path": str(Path(base.path).resolve()), **entry}
    # Only a torch file stores which tensors are tied, and what is no tensor.
    more = base.aliases or base.extra
    file = "base.ckpt" if more else "base.safetensors"
    save_state(base, folder / file)
    return {"file": file, **entry}
