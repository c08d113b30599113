"""All adapters of an encoder as a folder, here or on Hugging Face's hub."""

import json
import tempfile
from pathlib import Path
from urllib.parse import quote

import torch

from speechbrain_taskarith.adapters.bank import COMBINED
from speechbrain_taskarith.adapters.placement import (
    find_layers,
    make_banks,
    require_bare,
)
from speechbrain_taskarith.adapters.recipe import Watch
from speechbrain_taskarith.adapters.storage.files import (
    AdapterFiles,
    read_file,
)
from speechbrain_taskarith.adapters.storage.loading import load_files
from speechbrain_taskarith.utils.files import atomic_folder, now
from speechbrain_taskarith.utils.hub.cards import (
    KEY,
    card_path,
    hub_entries,
    read_card,
    write_card,
)
from speechbrain_taskarith.utils.hub.download import shared_folder
from speechbrain_taskarith.utils.hub.upload import upload_folder

_SUFFIX = ".safetensors"
_KIND = "adapters"
_TAGS = (KEY, "speechbrain", "adapter", "audio-adapterfusion")
_USE = """
```python
from speechbrain_taskarith.adapters import AdapterHandle

adapters = AdapterHandle.from_pretrained(encoder, {name})
adapters.use({first})
```
"""


class SharedAdapters(AdapterFiles):
    """The part of `AdapterHandle` that writes and reads whole folders."""

    def save(self, folder, *, base_model=None, license=None, language=None):
        """Write all adapters, the combination and a card into a folder.

        Atomically; an earlier folder of adapters is replaced.

        Arguments
        ---------
        folder : str or pathlib.Path
            Gets a `.safetensors` file for each adapter, one for the
            combination if there is one, and the card `README.md`.
        base_model : str or None
            The encoder's name on the hub, which the card links.
        license : str or None
            As the hub writes it, e.g. `"apache-2.0"`.
        language : str, sequence of str or None
            ISO 639 codes.

        Returns
        -------
        pathlib.Path
            The folder.

        Raises
        ------
        FileExistsError
            Something else is in that folder.
        ValueError
            An adapter holds NaN.
        """
        folder = Path(folder)
        filled = folder.exists() and (
            not folder.is_dir() or any(folder.iterdir())
        )
        if filled and read_card(folder).get("kind") != _KIND:
            raise FileExistsError(
                f"{folder}: holds something else than adapters that were "
                "saved here; choose another folder"
            )
        entries = hub_entries(
            base_model=[base_model],
            relation="adapter",
            library=KEY,
            tags=_TAGS,
            license=license,
            language=language,
        )
        with atomic_folder(folder) as inside:
            for i, name in enumerate(self.names):
                file = f"{quote(name, safe=' ')}{_SUFFIX}"
                self._save_adapter(name, inside / file, position=i)
            if self.combined_names:
                self.save_combination(inside / f"{COMBINED}{_SUFFIX}")
            facts = self._facts(base_model)
            front = entries | {KEY: facts}
            write_card(card_path(inside), front, _text(facts))
        return folder

    def push_to_hub(
        self,
        name,
        *,
        base_model=None,
        license=None,
        language=None,
        private=None,
        token=None,
        overwrite=False,
    ):
        """Share the adapters on Hugging Face's hub, as `save` writes them.

        Arguments
        ---------
        name : str
            `owner/name` of the repository, which is made.
        base_model, license, language
            See `save`.
        private : bool or None
            Who may see it; None: as the owner has set it.
        token : str or None
            None: as `hf auth login` left it, or `HF_TOKEN`.
        overwrite : bool
            True: a repository that holds files already gets a further
            commit, which replaces its adapters.

        Returns
        -------
        str
            Address of the repository.

        Raises
        ------
        FileExistsError
            The repository holds files, and `overwrite` is False.
        PermissionError
            The hub does not let the account write.
        ConnectionError
            The hub cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            about = {"license": license, "language": language}
            self.save(folder, base_model=base_model, **about)
            return upload_folder(
                folder,
                name,
                private=private,
                token=token,
                overwrite=overwrite,
                message=f"Upload adapters: {', '.join(self.names)}",
            )

    @classmethod
    def from_pretrained(
        cls,
        encoder,
        source,
        *,
        freeze=(),
        any_base=False,
        revision=None,
        cache=None,
    ):
        """Put adapters that were shared into an encoder that has none.

        Where they go, how wide they are and how they are combined is read
        from their files; no code of theirs runs. On an error the encoder has
        not changed.

        Arguments
        ---------
        encoder : torch.nn.Module
            With the weights that the adapters were trained on.
        source : str or pathlib.Path
            `owner/name` on the hub, or a folder that `save` wrote. Only
            `.safetensors` files are downloaded.
        freeze : module, sequence or dict of modules
            See `AdapterHandle.freeze`.
        any_base : bool
            See `AdapterHandle.load_adapter`.
        revision : str or None
            Branch, tag or commit; None: the newest.
        cache : str, pathlib.Path or None
            Folder for downloads; None: Hugging Face's own cache.

        Returns
        -------
        AdapterHandle
            Nothing is in use and nothing trains yet: `use`, or `train_*`.

        Raises
        ------
        FileNotFoundError
            No such folder or repository, no network and nothing cached, or
            no adapters there.
        ValueError
            An encoder that has adapters or other layers, another base, a
            damaged file.
        """
        require_bare(encoder)  # before anything is downloaded
        folder = shared_folder(source, (f"*{_SUFFIX}",), cache, revision)
        return put_into(cls, encoder, folder, source, freeze, any_base)

    def _facts(self, base_model):
        """Return what the card says of the adapters."""
        bank = self.layers[0].bank
        facts = {
            "kind": _KIND,
            "date": now(),
            "base_model": base_model,
            "base": self.base_fingerprint(),
            "frozen": self.frozen_fingerprints(),
            "layers": self.layer_names,
            "adapters": [
                {
                    "name": name,
                    "bottleneck": bank[name].bottleneck,
                    "parameters": sum(
                        parameter.numel()
                        for layer in self.layers
                        for parameter in layer.bank[name].parameters()
                    ),
                }
                for name in self.names
            ],
        }
        if self.combined_names:
            made = self.layers[0].combination
            facts["combination"] = {
                "class": type(made).__name__,
                "names": self.combined_names,
                "settings": made.settings(),
            }
        return facts


def put_into(cls, encoder, load, source, freeze=(), any_base=False):
    """Put the adapters of a file or a folder into a bare encoder."""
    require_bare(encoder)
    headers = _headers(load, source)
    first = next(iter(headers.values()))
    try:
        found = find_layers(encoder, first["layers"])
    except ValueError as error:
        raise ValueError(
            f"{source}: made for another encoder: {error}"
        ) from None
    widths = set(first["d_model"])
    banks = make_banks(
        found,
        list(headers),
        first["bottleneck"],
        _activation(first["activation"], source),
        first["layer_norm"],
        d_model=widths.pop() if len(widths) == 1 else None,
    )
    handle = cls(encoder, found, banks)
    try:
        handle.freeze(freeze)
        for loaded in load_files(handle, load, any_base):
            loaded.check(handle)
    except BaseException:
        handle.remove()
        raise
    handle._route.watch = Watch(handle)
    return handle


def _headers(load, source):
    """Return `{adapter's name: header}` of a file, or of a folder's files."""
    headers = {}
    paths = sorted(load.glob(f"*{_SUFFIX}")) if load.is_dir() else [load]
    for path in paths:
        header = read_file(path)[1]
        if header is None:
            raise ValueError(
                f"{path}: holds no adapter of this plugin; files of other "
                "libraries are loaded by handle.load_adapter(path, name, "
                "name_map=...)"
            )
        if header["kind"] == "adapter":
            headers[header["name"]] = header
    # Files of earlier versions, and single ones, have no position.
    last = len(headers)
    by_position = sorted(
        headers.items(), key=lambda item: item[1].get("position", last)
    )
    headers = dict(by_position)
    if not headers:
        raise FileNotFoundError(
            f"{source}: holds no adapters; a folder of them is written by "
            "handle.save(folder) and shared by handle.push_to_hub(name)"
        )
    return headers


def _activation(text, source):
    """Return the class of an activation that a file names, e.g. `SiLU()`."""
    found = getattr(torch.nn.modules.activation, text.partition("(")[0], None)
    try:
        if isinstance(found, type) and repr(found()) == text:
            return found
    except TypeError:  # one that takes arguments
        pass
    raise ValueError(
        f"{source}: its adapters have the activation {text}, which is none of "
        "torch.nn with its default arguments; insert them by insert_adapters("
        "activation=..., load=...)"
    )


def _text(facts):
    names = [entry["name"] for entry in facts["adapters"]]
    base = facts["base_model"] or "an encoder"
    lines = [
        f"# Adapters for {base}: {', '.join(names)}",
        "",
        f"Bottleneck adapters behind {len(facts['layers'])} layers; the "
        "encoder itself is unchanged and not in this folder.",
        _USE.format(name='"owner/name"', first=json.dumps(names[0])),
        "| adapter | bottleneck | parameters |",
        "| --- | --- | --- |",
    ]
    for entry in facts["adapters"]:
        name = entry["name"].replace("|", "\\|")
        lines.append(
            f"| {name} | {entry['bottleneck']} | {entry['parameters']:,} |"
        )
    if made := facts.get("combination"):
        listed = ", ".join(made["names"])
        lines += ["", f"`use('{COMBINED}')`: {made['class']} of {listed}."]
    lines += ["", f"Fingerprint of the encoder: `{facts['base']}`"]
    return "\n".join(lines) + "\n"
