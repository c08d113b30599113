"""Sequential model editing: learn domain after domain without old data.

Kulshreshtha, Dingliwal, Houston, Pappas and Ronanki, "Sequential Editing for
Lifelong Training of Speech Recognition Models", Interspeech 2024,
https://arxiv.org/abs/2406.17935.
"""

from speechbrain_taskarith.utils.files import now
from speechbrain_taskarith.utils.patterns import as_tuple
from speechbrain_taskarith.vectors import checks
from speechbrain_taskarith.vectors.editing.folder import (
    EditFolder,
    check_finite,
)
from speechbrain_taskarith.vectors.editing.learning import (
    check_edits,
    make_edit,
)
from speechbrain_taskarith.vectors.editing.log import Edit, has_log
from speechbrain_taskarith.vectors.editing.schedules import plain_schedule
from speechbrain_taskarith.vectors.encodings import ENCODINGS
from speechbrain_taskarith.vectors.rules.base import check_rule
from speechbrain_taskarith.vectors.rules.description import from_description
from speechbrain_taskarith.vectors.sharing.card import ModelCard
from speechbrain_taskarith.vectors.states.readers import as_model, as_state
from speechbrain_taskarith.vectors.states.state import short
from speechbrain_taskarith.vectors.states.writers import save_state


class SequentialEditor:
    """Edits a model once per domain and logs every edit.

    With `theta_hat_t` fine-tuned on domain `t` from `theta_{t-1}`::

        tau_t   = theta_hat_t - theta_{t-1}
        theta_t = theta_{t-1} + scale * rule(tau_t)

    (eq. 1-3 of the paper). A scale of 1 with task arithmetic is plain
    fine-tuning, 0 learns nothing. With one vector at a time, TIES is
    magnitude trimming.

    The folder holds a copy of the base, each vector as it was applied (after
    the rule, encoded), copies of the last states, and the log. The state is
    a function of the folder alone: undoing the last edit, or resuming in
    another process, gives the same bytes, whatever the encoding rounds. A
    killed process loses nothing.

    Of a half precision base too the states are float32, since rounding would
    add up; `state(dtype)` and `save` give them in any type.

    Arguments
    ---------
    base : path, torch.nn.Module, or mapping of tensors
        The state to start from. It is copied into the folder.
    rule : Rule
        What makes the edit of a task vector (`TIES`, `TaskArithmetic`, ...).
    folder : str or pathlib.Path
        The editor's own folder; made when missing. It must not hold
        another sequence: open that with `SequentialEditor.resume`.
    scale : None, float, dict, list, str or callable
        None: the rule's own scale. A number, or `{pattern: number}`: for
        every edit. A list: one entry an edit. `"1/t"`: the base counts as
        the first domain, so the first edit gets 1/2, the next 1/3; with
        task arithmetic this is the running average of the models. A
        callable gets the number of the edit (1, 2, ...).
    encoding : str
        How vectors are stored, see `TaskVector.save`. `"auto"`: exactly, as
        `"sparse"` where that is smaller (what a rule trimmed), else as
        `"lossless"` (4 bytes a parameter). Or one of `"lossless"`, `"bf16"`,
        `"int8"`, `"sparse"`, `"sparse-bf16"`, `"sparse-int8"`.
    include, exclude : str or sequence of str
        Patterns of the parameters that are edited.
    keep_base : str
        `"copy"` makes the folder self-contained. `"reference"` keeps the
        base's path and fingerprint only (it must be a path, and stay).
    copies : int
        How many of the last states the folder keeps, each as large as the
        model in float32. 2: opening the folder, and undoing the last edit,
        read a state; 0: they build it from the base.

    Example
    -------
    >>> import torch
    >>> from speechbrain_taskarith.vectors import TaskArithmetic
    >>> folder = str(getfixture("tmpdir") / "edits")
    >>> base = {"w": torch.tensor([0.0, 1.0])}
    >>> editor = SequentialEditor(base, TaskArithmetic(scale=0.5), folder)
    >>> editor.learn("german", {"w": torch.tensor([2.0, 1.0])})["w"]
    tensor([1., 1.])
    >>> editor.learn("greek", {"w": torch.tensor([1.0, 3.0])})["w"]
    tensor([1., 2.])
    >>> _ = editor.undo("greek")
    >>> editor.state()["w"], [edit.name for edit in editor.log]
    (tensor([1., 1.]), ['german'])
    >>> editor.close()
    """

    def __init__(
        self,
        base,
        rule,
        folder,
        *,
        scale=None,
        encoding="auto",
        include=("*",),
        exclude=(),
        keep_base="copy",
        copies=2,
    ):
        checks.one_of("keep_base", keep_base, ("copy", "reference"))
        checks.one_of("encoding", encoding, ("auto", *ENCODINGS))
        check_rule(rule, vectors=1)
        base = as_model(base)
        base.verify()
        check_finite(base, base.label, include, exclude)
        check_edits(base, rule, scale, include, exclude)
        self._files = EditFolder.start(
            folder,
            base,
            keep_base,
            rule=rule.describe(),
            schedule=plain_schedule(scale),
            encoding=encoding,
            include=list(as_tuple(include)),
            exclude=list(as_tuple(exclude)),
            copies=checks.whole("copies", copies),
        )
        self._set_up(rule, scale, include, exclude)

    @classmethod
    def resume(
        cls,
        folder,
        rule=None,
        *,
        scale=None,
        include=None,
        exclude=None,
        read_only=False,
        verify=False,
    ) -> "SequentialEditor":
        """Open a folder that an editor has written.

        Arguments
        ---------
        folder : str or pathlib.Path
            The folder.
        rule : Rule or None
            For further edits; None builds it from the log (not for rules
            from outside this package).
        scale, include, exclude : object or None
            For further edits, as for the constructor; None takes the log's.
        read_only : bool
            True takes no lock and changes nothing: for looking, and for the
            other processes of a distributed run.
        verify : bool
            False: what is used is compared with the log when it is used.
            True: the base, every vector and every state now, in the time of
            as many edits.

        Returns
        -------
        SequentialEditor
            Its `state()` has the bytes of the last edit.

        Raises
        ------
        FileNotFoundError
            No log, or a file that it names is gone.
        ValueError
            The log, the base or a vector is damaged.
        RuntimeError
            Another process edits the folder.
        """
        editor = cls.__new__(cls)
        editor._files = EditFolder.reopen(folder, read_only)
        try:
            log = editor._files.log
            editor._set_up(
                rule,
                log.schedule if scale is None else scale,
                log.include if include is None else include,
                log.exclude if exclude is None else exclude,
            )
            if (rule, scale, include, exclude) != (None,) * 4:
                check_edits(
                    editor._files.open_base(),
                    editor._get_rule(),
                    editor.scale,
                    editor._include,
                    editor._exclude,
                )
            if verify:
                editor._files.build(editor.log, len(editor.log), from_base=True)
        except BaseException:
            editor.close()
            raise
        return editor

    @classmethod
    def open(cls, base, rule, folder, **arguments):
        """Resume where the folder holds a sequence, else start one.

        For a recipe that may be killed and started again. Arguments: see
        `SequentialEditor`. Another base than the folder's is a ValueError.
        """
        if not has_log(folder):
            return cls(base, rule, folder, **arguments)
        base = as_model(base)  # as the constructor: no names of wrappers
        resumable = {"scale", "include", "exclude"} & arguments.keys()
        editor = cls.resume(
            folder, rule, **{k: arguments[k] for k in resumable}
        )
        found = editor.base_fingerprint
        if found != base.fingerprint:
            editor.close()
            raise ValueError(
                f"{folder}: its sequence starts from base {short(found)}, not "
                f"from {base.label} ({short(base.fingerprint)}); use another "
                "folder"
            )
        return editor

    @property
    def folder(self):
        """Folder of the base, the vectors and the log: a `Path`."""
        return self._files.path

    @property
    def log(self):
        """The edits in force, in order: a list of `Edit`."""
        return list(self._files.log.edits)

    @property
    def history(self):
        """Everything done, undone edits included: a list of dicts."""
        return [dict(entry) for entry in self._files.log.history]

    @property
    def base_fingerprint(self):
        """Fingerprint of the state that the sequence starts from."""
        return self._files.log.base["fingerprint"]

    @property
    def fingerprint(self):
        """Fingerprint of the present state, as `state()` gives it."""
        return self.log[-1].state if self.log else self._state().fingerprint

    def state(self, dtype=None):
        """Return the present weights as `TaskVector.apply` does.

        A copy, tied tensors tied.

        Arguments
        ---------
        dtype : str, torch.dtype or None
            Of all floating point tensors, e.g. `"bfloat16"`; or `"base"`: as
            in the base. None: as the editor keeps them, which is float32
            where the base holds half precision. That a state was given away
            rounded is logged (unless opened with `read_only`), see `learn`.

        Returns
        -------
        dict
            `{name: tensor}`; ValueError where the type cannot hold a tensor.
        """
        return self._files.give(self._state(), dtype).to_dict()

    def vector(self, name):
        """Read an edit's `TaskVector`, before its scale (see `Edit`)."""
        return self._files.vector(self._edit(name))

    def learn(
        self,
        name,
        finetuned,
        *,
        scale=None,
        selected_on=None,
        note="",
        started_from=None,
    ):
        """Edit: add a share of what fine-tuning on a domain has changed.

        Arguments
        ---------
        name : str
            The domain's name, new in this sequence.
        finetuned : path, torch.nn.Module, or mapping of tensors
            The model fine-tuned from the present state.
        scale : float, dict or None
            This edit's scale, e.g. from `search_scale`; None follows the
            editor's.
        selected_on, note : str
            For the log: what the scale was chosen on, and free text.
        started_from : str or None
            The type in which the fine-tuning got the present state, as for
            `state`; rounding to it is no part of what was learned. None:
            half precision where `finetuned` is stored so; or else, of the
            types in which the present state was given away, the one to
            which most numbers are nearer. The log holds what was taken.

        Returns
        -------
        dict
            The weights after the edit, as `state()` gives them.

        Raises
        ------
        ValueError
            A name in use, NaN or infinity, an unusable scale.
        KeyError
            Parameters that are not those of the present state.
        """
        self._files.check_writable()
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a text, got {name!r}")
        if any(edit.name == name for edit in self.log):
            raise ValueError(
                f"{self.folder}: {name!r} was learned already; undo it first "
                "or choose another name"
            )
        before, rule = self._state(), self._get_rule()
        vector, scale, started_from = make_edit(
            before,
            finetuned,
            rule,
            number=len(self.log) + 1,
            types_for=self._files.types,
            given=self._files.log.handed_out(before.fingerprint),
            schedule=self.scale,
            scale=scale,
            started_from=started_from,
            include=self._include,
            exclude=self._exclude,
        )
        try:
            # What is applied is what is read back, whatever the encoding
            # rounds: the log and the weights never disagree.
            file, digest, encoding, vector = self._files.store(
                name, vector, self._files.log.encoding
            )
            after = as_state(vector.apply(before, scale))
            edit = Edit(
                name=name,
                vector=file,
                sha256=digest,
                encoding=encoding,
                scale=scale,
                rule=rule.describe(),
                learned_on=before.fingerprint,
                state=after.fingerprint,
                exact=True,
                when=now(),
                selected_on=selected_on,
                note=note,
                started_from=started_from,
            )
        except BaseException:
            self._files.back_to_disk()
            raise
        act = {"action": "learn", "name": name, "edit": edit.to_dict()}
        self._commit(after, {after.fingerprint: after}, **act)
        return self.state()

    def undo(self, name):
        """Take an edit back and return it, see `Edit`.

        Undoing the last edit gives the state before it bit for bit, since
        nothing is subtracted: it is read, or built from the base forward.
        Undoing an earlier one applies the later vectors to another state than
        they were learned on; the log marks them `exact=False`.
        """
        self._files.check_writable()
        removed, edits = self._edit(name), self.log
        index = edits.index(removed)
        edits.remove(removed)
        self._replace(edits, index, action="undo", name=name)
        return removed

    def redo(self):
        """Bring the edit back that was undone last, and return it.

        Possible until the next `learn` or `reorder`. Undo and redo give the
        bytes of before.

        Returns
        -------
        Edit
            As it is in force now; ValueError where there is none to redo.
        """
        self._files.check_writable()
        if not self._files.log.undone:
            raise ValueError(
                f"{self.folder}: nothing was undone since the last edit"
            )
        index, edit = self._files.log.undone[-1]
        edits = self.log
        edits.insert(index, edit)
        self._replace(edits, index, action="redo", name=edit.name)
        return self.log[index]

    def reorder(self, names):
        """Apply the stored vectors in another order.

        An approximation where a vector is applied to another state than it
        was learned on (`exact=False` in the log); going back to the first
        order gives the first bytes.

        Arguments
        ---------
        names : sequence of str
            All names of the sequence, in the new order.

        Returns
        -------
        list of Edit
            The new log.
        """
        self._files.check_writable()
        names, learned = list(names), [edit.name for edit in self.log]
        if sorted(names) != sorted(learned):
            raise ValueError(
                f"names: expected each of {learned} once, got {names}. To "
                "leave one out use undo(name)"
            )
        edits = [self._edit(name) for name in names]
        same = [one == other for one, other in zip(names, learned)]
        known = [*same, False].index(False)
        self._replace(edits, known, action="reorder", order=names)
        return self.log

    def save(self, path, *, dtype=None, **arguments):
        """Write the present weights as `save_state` does, and return the path.

        In a type as `state` takes it. A model card comes beside them;
        `**arguments` are for it: `wer`, `selected_on`, `notes`, ... (see
        `ModelCard`).
        """
        state = self._files.give(self._state(), dtype)
        arguments = {"fingerprint": state.fingerprint, **arguments}
        card = ModelCard.of_edits(self, **arguments)
        path = save_state(state, path, metadata=card.provenance())
        card.save(path)
        return path

    def close(self):
        """Let other processes edit the folder."""
        self._files.close()

    def __enter__(self) -> "SequentialEditor":
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        names = ", ".join(edit.name for edit in self.log) or "no edits"
        return f"SequentialEditor({self.folder}: {names})"

    def _set_up(self, rule, scale, include, exclude):
        self.rule, self.scale = rule, scale
        self._include, self._exclude = include, exclude
        self._current = None

    def _get_rule(self):
        if self.rule is not None:
            return check_rule(self.rule)
        try:
            self.rule = from_description(self._files.log.rule)
        except ValueError as error:
            hint = "SequentialEditor.resume(folder, rule=...)"
            path = self._files.log.path
            raise ValueError(f"{path}: {error}: {hint}") from None
        return self.rule

    def _state(self):
        if self._current is None:
            self._current = self._files.present()
        return self._current

    def _replace(self, edits, known, **act):
        """Put other edits into force; the first `known` stay as they are."""
        state, changed, built = self._files.build(edits, known)
        self._commit(state, built, **act, changed=changed)

    def _commit(self, state, built, **act):
        self._current = None
        self._files.commit(built, **act)
        self._current = state

    def _edit(self, name):
        edits = {edit.name: edit for edit in self.log}
        if name not in edits:
            raise KeyError(
                f"{self.folder}: no edit {name!r}; there are: "
                f"{', '.join(edits) or 'none'}"
            )
        return edits[name]
