"""Cards: Markdown whose front matter is read by hubs and by programs.

What Hugging Face's hub reads stands under its own names (`base_model`,
`license`, `model-index`, ...), what this plugin knows under `KEY`.
"""

import json
import re
from pathlib import Path

from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.hub.download import is_hub_name

#: Where a card's front matter holds what this plugin says.
KEY = "speechbrain_taskarith"
FILE = "README.md"
_FRONT = re.compile(r"\A---\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_RELATIONS = ("merge", "finetune", "adapter")


def card_path(output):
    """Return where the card of weights stands.

    Example
    -------
    >>> card_path("results/edited.ckpt").name
    'edited.ckpt.md'
    """
    output = Path(output)
    if output.is_dir():
        return output / FILE
    return output.with_name(f"{output.name}.md")


def hub_names(sources):
    """Return those of some texts that name models on the hub, each once."""
    names = (str(s) for s in sources if s and is_hub_name(s))
    return [n for n in dict.fromkeys(names) if not Path(n).exists()]


def hub_entries(
    *, base_model=(), relation=None, library, tags, license=None, language=None
):
    """Return the entries of front matter that the hub itself reads.

    Arguments
    ---------
    base_model : sequence
        What it was made from; only names on the hub are written.
    relation : str or None
        What it is to them: `"merge"`, `"finetune"` or `"adapter"`.
    library : str
        What loads it, `library_name`.
    tags : sequence of str
        For the hub's search.
    license : str or None
        As the hub writes it, e.g. `"apache-2.0"`.
    language : str, sequence of str or None
        ISO 639 codes.

    Returns
    -------
    dict
        In the order of the hub's own cards, without what is unknown.
    """
    if relation not in (None, *_RELATIONS):
        raise ValueError(
            f"relation is {relation!r}, expected one of {', '.join(_RELATIONS)}"
        )
    languages = [language] if isinstance(language, str) else language
    bases = hub_names(base_model)
    found = {
        "license": license,
        "language": list(languages or ()),
        "library_name": library,
        "base_model": bases[0] if len(bases) == 1 else bases,
        "base_model_relation": relation if bases else None,
        "tags": list(dict.fromkeys(tags)),
    }
    return {key: value for key, value in found.items() if value}


def model_index(name, results, task):
    """Return the entry from which the hub makes its table of results.

    Arguments
    ---------
    name : str
        Of the model.
    results : sequence of dict
        `"dataset"` (a name), `"metric"` (the hub's, e.g. `"wer"`),
        `"value"` and, where known, `"split"` and `"label"`.
    task : str
        The hub's name of the task, e.g. `"automatic-speech-recognition"`.

    Returns
    -------
    dict
        `{"model-index": [...]}`; empty without results.
    """
    entries = []
    for result in results:
        dataset = str(result["dataset"])
        entry = {"type": re.sub(r"\s+", "_", dataset.lower()), "name": dataset}
        if result.get("split"):
            entry["split"] = str(result["split"])
        metric = {"type": result["metric"], "value": result["value"]}
        metric["name"] = str(result.get("label") or result["metric"])
        entries.append(
            {"task": {"type": task}, "dataset": entry, "metrics": [metric]}
        )
    if not entries:
        return {}
    return {"model-index": [{"name": name, "results": entries}]}


def write_card(path, front, text):
    """Write a card atomically; a text that another has written is kept.

    Arguments
    ---------
    path : str or pathlib.Path
        Of the card, see `card_path`.
    front : dict
        Plain values, among them `KEY`.
    text : str
        Markdown.

    Returns
    -------
    pathlib.Path
        The path.

    Raises
    ------
    ValueError
        NaN or infinity in the front matter.
    FileExistsError
        A file without our front matter stands there.
    """
    import yaml

    path = Path(path)
    front = checked_front(path, front)
    # Width: one value, one line, so that a card can be searched by lines.
    head = yaml.safe_dump(
        front, sort_keys=False, allow_unicode=True, width=1 << 20
    )
    with atomic_write(path, "w") as stream:
        stream.write(f"---\n{head}---\n\n{text}")
    return path


def checked_front(path, front):
    """Return front matter as it is written, or raise as `write_card`."""
    try:
        # Plain types only, and no NaN.
        front = json.loads(json.dumps(front, allow_nan=False))
    except ValueError as error:
        raise ValueError(
            f"{path}: a card holds finite numbers only ({error}); leave NaN "
            "and infinity out"
        ) from None
    if Path(path).is_file() and KEY not in read_front(path):
        raise FileExistsError(
            f"{path}: stands there and is no card of this plugin; move it "
            "away, or write into another folder"
        )
    return front


def read_front(path):
    """Return a card's front matter as a dict, empty where there is none.

    A `ValueError` names a file whose front matter cannot be read.

    Example
    -------
    >>> path = getfixture("tmp_path") / "README.md"
    >>> _ = path.write_text("---\\nlicense: mit\\n---\\n# Mine\\n")
    >>> read_front(path)
    {'license': 'mit'}
    """
    import yaml

    try:
        found = _FRONT.match(Path(path).read_text(encoding="utf-8"))
        front = yaml.safe_load(found[1]) if found else {}
        if front is None or isinstance(front, dict):
            return front or {}
        reason = f"a {type(front).__name__}, expected names and values"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
    raise ValueError(
        f"{path}: its front matter cannot be read ({reason}); mend it or "
        "write the card again"
    )


def read_card(output):
    """Return what a card of ours says of weights, empty without one."""
    entry = read_front(card_path(output)).get(KEY, {})
    return entry if isinstance(entry, dict) else {}
