"""The folder of a sequence of edits: base, vectors, log, lock."""

from dataclasses import replace
from pathlib import Path

from speechbrain_taskarith.utils.files import (
    now,
    remove_leftovers,
    sha256_of,
)
from speechbrain_taskarith.vectors.editing.log import (
    LOG_NAME,
    EditLog,
    FolderLock,
    slug,
)
from speechbrain_taskarith.vectors.states.readers import as_state, open_state
from speechbrain_taskarith.vectors.states.state import short
from speechbrain_taskarith.vectors.states.writers import save_state
from speechbrain_taskarith.vectors.task_vector import TaskVector

_VECTORS = "vectors"


class EditFolder:
    """What a `SequentialEditor` stores on the disk.

    Only what the log names counts, and the log is replaced last: that is all
    there is to surviving a kill.
    """

    def __init__(self, path, lock, log=None):
        self.path = Path(path)
        self.lock = lock
        self.log = EditLog.read(self.path) if log is None else log

    @classmethod
    def start(cls, path, base, keep_base, **settings):
        """Begin a sequence; `settings` are fields of the `EditLog`."""
        path = Path(path)
        if (path / LOG_NAME).exists():
            raise FileExistsError(
                f"{path}: holds a sequence of edits already. Go on with "
                "SequentialEditor.resume(folder), or use another folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(path)
        try:
            log = EditLog(
                base=_store_base(path, base, keep_base),
                edits=[],
                history=[{"action": "start", "when": now()}],
                **settings,
            )
            log.write(path)
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
            if not read_only:
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
        entry = self.log.base
        path = self.path / entry["file"] if "file" in entry else entry["path"]
        if not Path(path).exists():
            raise FileNotFoundError(
                f"{path}: the base of the sequence in {self.path} is gone; "
                "restore it from a copy"
            )
        base = open_state(path)
        if base.fingerprint != entry["fingerprint"]:
            raise ValueError(
                f"{path}: is not the base that {self.path} started from "
                f"(fingerprint {short(base.fingerprint)}, expected "
                f"{short(entry['fingerprint'])}); it was altered or replaced"
            )
        return base

    def store(self, name, vector, encoding):
        """Write a vector; it does not count until it is committed.

        Returns its file (relative to the folder), that file's SHA-256, and the
        vector as it is read back.
        """
        number = len(self.log.history)
        file = f"{_VECTORS}/{number:04d}-{slug(name)}.safetensors"
        path = self.path / file
        vector.save(path, encoding=encoding)
        return file, sha256_of(path), TaskVector.load(path)

    def vector(self, edit):
        """Read the vector of an edit and check its hash."""
        path = self.path / edit.vector
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the vector of edit {edit.name!r} is gone; restore "
                "it from a copy of the folder"
            )
        if sha256_of(path) != edit.sha256:
            raise ValueError(
                f"{path}: the vector of edit {edit.name!r} is not the one "
                "that was written (its hash differs from the log's); restore "
                "it from a copy of the folder"
            )
        return TaskVector.load(path)

    def forward(self, edits, check=False):
        """Apply edits in order, from the base on.

        Returns the last state, and the edits with states and exactness as they
        are in this order. `check` compares each state with the one in the log.
        """
        state, applied = self.base(), []
        for edit in edits:
            before = state.fingerprint
            vector = self.vector(edit)
            state = as_state(vector.apply(state, edit.scale, any_base=True))
            if check and state.fingerprint != edit.state:
                raise ValueError(
                    f"{self.path}: after edit {edit.name!r} the weights are "
                    "not those that the log reports, though all files are "
                    "whole; was the log altered by hand?"
                )
            exact = edit.learned_on == before
            applied.append(replace(edit, state=state.fingerprint, exact=exact))
        return state, applied

    def commit(self, edits, **entry):
        """Put a new list of edits into force: the last step of a change."""
        history = [*self.log.history, {**entry, "when": now()}]
        log = replace(self.log, edits=edits, history=history)
        log.write(self.path)
        self.log = log

    def back_to_disk(self):
        """After a failure: take the log from the disk, and sweep the rest."""
        # An interrupt may come right after the log was replaced.
        self.log = EditLog.read(self.path)
        self.sweep()

    def sweep(self):
        """Remove what the log does not name: left-overs, undone vectors."""
        vectors = self.path / _VECTORS
        remove_leftovers(self.path)
        remove_leftovers(vectors)
        named = {Path(edit.vector).name for edit in self.log.edits}
        for file in vectors.glob("[0-9]*.safetensors"):
            if file.name not in named:
                file.unlink(missing_ok=True)

    def close(self):
        """Let others edit."""
        if self.lock is not None:
            self.lock.release()


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
    # Only a torch file stores which tensors are tied.
    file = "base.ckpt" if base.aliases else "base.safetensors"
    save_state(base, folder / file)
    return {"file": file, **entry}
