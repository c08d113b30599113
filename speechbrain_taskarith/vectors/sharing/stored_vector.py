"""A task vector as a file, and as a repository of Hugging Face's hub."""

import tempfile
from pathlib import Path

from speechbrain_taskarith.utils.hub.download import shared_folder
from speechbrain_taskarith.utils.hub.upload import upload_folder
from speechbrain_taskarith.vectors.encodings import read_vector, write_vector
from speechbrain_taskarith.vectors.sharing.card import ModelCard
from speechbrain_taskarith.vectors.states.readers import open_state

#: What a vector is called in a folder that is shared.
VECTOR_FILE = "task_vector.safetensors"


class StoredVector:
    """The part of `TaskVector` that writes, reads and shares it."""

    base_fingerprint: str | None
    metadata: dict

    def save(self, path, *, encoding="lossless"):
        """Store the vector as safetensors, atomically.

        Arguments
        ---------
        path : str or pathlib.Path
            Must end in `.safetensors`.
        encoding : str
            `"lossless"`, `"bf16"`, `"int8"`, `"sparse"` (exact; small for a
            trimmed vector), `"sparse-bf16"` or `"sparse-int8"`; see
            `encodings.encode`.

        Returns
        -------
        pathlib.Path
            The path.
        """
        return write_vector(self, path, encoding)

    @classmethod
    def load(cls, path):
        """Load, onto the CPU, what `save` wrote to a path (see `save`).

        ValueError for a damaged file, and for weights that are no vector.
        """
        return cls(*read_vector(path))

    def card(self, **fields) -> ModelCard:
        """Return the vector's card, for `save` or `push_to_hub`.

        Arguments
        ---------
        **fields
            As `ModelCard` takes them: `wer`, `license`, `language`, ...

        Returns
        -------
        ModelCard
            With the base, and the model that was fine-tuned, as parents.
        """
        base = {"role": "base", "fingerprint": self.base_fingerprint}
        if "base" in self.metadata:
            base["path"] = self.metadata["base"]
        parents = [base]
        tuned = ModelCard.parent("fine-tuned", self)
        if len(tuned) > 2:
            parents.append(tuned)
        given = {
            "title": "Task vector",
            "parents": parents,
            "relation": "adapter",
            "tags": ["task-vector", "task-arithmetic", "speechbrain"],
        }
        return ModelCard(**{**given, **fields})

    def push_to_hub(
        self,
        name,
        *,
        encoding="lossless",
        card=None,
        private=None,
        token=None,
        overwrite=False,
    ):
        """Share the vector on Hugging Face's hub, with its card.

        Arguments
        ---------
        name : str
            `owner/name` of the repository.
        encoding : str
            See `save`.
        card : ModelCard or None
            None: `self.card()`. Its base is linked where it is on the hub.
        private, token, overwrite
            See `push_folder`, also for what is raised.

        Returns
        -------
        str
            Address of the repository.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = self.save(Path(folder) / VECTOR_FILE, encoding=encoding)
            card = self.card() if card is None else card
            card.fingerprint = open_state(path).fingerprint
            card.save(folder)
            return upload_folder(
                folder,
                name,
                private=private,
                token=token,
                overwrite=overwrite,
                message="Upload a task vector",
            )

    @classmethod
    def from_pretrained(cls, source, *, revision=None, cache=None):
        """Load a vector that was shared.

        Nothing but its file is downloaded, and no code of it runs.

        Arguments
        ---------
        source : str or pathlib.Path
            `owner/name` on the hub, or a folder that holds
            `task_vector.safetensors`.
        revision : str or None
            Branch, tag or commit; None: the newest.
        cache : str, pathlib.Path or None
            Folder for downloads; None: Hugging Face's own cache.

        Returns
        -------
        TaskVector
            As `load`. `apply` checks that the base is the one it was taken
            from.

        Raises
        ------
        FileNotFoundError
            No such folder or repository, no network and nothing cached, or
            no vector in it.
        """
        folder = shared_folder(source, (VECTOR_FILE,), cache, revision)
        if not (folder / VECTOR_FILE).is_file():
            raise FileNotFoundError(
                f"{source}: holds no {VECTOR_FILE}; a vector is shared by "
                "TaskVector.push_to_hub. Weights are opened by "
                "open_state(name)"
            )
        return cls.load(folder / VECTOR_FILE)


def push_folder(
    folder, name, *, private=None, token=None, overwrite=False, message=None
):
    """Share a folder of weights on Hugging Face's hub, with its card.

    One that was merged, edited or trained: a Hugging Face folder, a `CKPT+`
    folder, or one with weights and a card. Only weights, what describes the
    model and `README.md` are uploaded.

    Arguments
    ---------
    folder : str or pathlib.Path
        It must hold a card (`ModelCard.save` writes one).
    name : str
        `owner/name` of the repository, which is made.
    private : bool or None
        Who may see it; None: as the owner has set it.
    token : str or None
        None: as `hf auth login` left it, or `HF_TOKEN`.
    overwrite : bool
        True: a repository that holds files already gets a further commit,
        which replaces its weights.
    message : str or None
        Of the commit.

    Returns
    -------
    str
        Address of the repository.

    Raises
    ------
    FileNotFoundError
        No folder, no weights or no card.
    FileExistsError
        The repository holds files, and `overwrite` is False.
    PermissionError
        The hub does not let the account write.
    ConnectionError
        The hub cannot be reached.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> push_folder(folder, "me/merged")
    Traceback (most recent call last):
    FileNotFoundError: ...README.md: no such card; ...
    """
    return upload_folder(
        folder,
        name,
        private=private,
        token=token,
        overwrite=overwrite,
        message=message,
    )
