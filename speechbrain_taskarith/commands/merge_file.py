"""Merge files: what to merge, by which rule, where to, as plain YAML."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

# Stands for a value that the command line has to give.
_PLACEHOLDER = "!PLACEHOLDER"


@dataclass
class MergePlan:
    """The content of a merge file.

    Arguments
    ---------
    base : str
        The weights that all others were fine-tuned from.
    finetuned : list of str
        Checkpoints, or stored task vectors.
    rule : str or dict
        See `rule_text.make_rule`.
    output : str
        Where to write.
    scale : float, dict or None
        Replaces the rule's own.
    recoverable : str or None
        Whose weights, in SpeechBrain checkpoint folders.
    device : str
        Where to compute.
    memory_limit : int, str or None
        Bytes, or a text such as `"300MB"`.
    threads : int or None
        None: as many as there are cores.
    include, exclude : list of str
        Patterns of the parameters to edit; the others are the base's.
    buffers : str
        `"base"` or `"edit"`: running statistics.
    any_base : bool
        True: stored vectors may come from another base.
    fingerprint : bool
        False saves the time to hash all bytes.
    """

    base: str
    finetuned: list
    rule: object
    output: str
    scale: object = None
    recoverable: str | None = None
    device: str = "cpu"
    memory_limit: object = None
    threads: int | None = None
    include: list = field(default_factory=lambda: ["*"])
    exclude: list = field(default_factory=list)
    buffers: str = "base"
    any_base: bool = False
    fingerprint: bool = True


KEYS = tuple(entry.name for entry in fields(MergePlan))
LISTS = ("finetuned", "include", "exclude")
REQUIRED = ("base", "finetuned", "rule", "output")


def read_plan(path=None, overrides=()):
    """Read a merge file and what replaces its values.

    Arguments
    ---------
    path : str, pathlib.Path or None
        YAML with plain values: a tag such as `!new:` is refused, so that a
        file from elsewhere cannot build anything. `!PLACEHOLDER` marks what
        the overrides have to give. Paths inside are as for the shell,
        relative to where the command runs.
    overrides : sequence of tuple
        `(key, value)`; a dot leads into a mapping (`rule.density`).

    Returns
    -------
    MergePlan
        Complete.

    Raises
    ------
    ValueError
        No YAML, unknown or missing keys, values of another kind.

    Example
    -------
    >>> path = getfixture("tmpdir") / "merge.yaml"
    >>> _ = path.write("base: a.ckpt\\nfinetuned: [b.ckpt]\\nrule: TIES\\n")
    >>> plan = read_plan(path, [("output", "c.ckpt"), ("rule.density", 0.5)])
    >>> plan.rule, plan.output
    ({'name': 'TIES', 'density': 0.5}, 'c.ckpt')
    """
    label = "merge" if path is None else str(path)
    content = {} if path is None else _load(path)
    for key, value in overrides:
        _set(content, key, value)
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ValueError(
            f"{label}: unknown {', '.join(map(repr, unknown))}; a merge file "
            f"holds: {', '.join(KEYS)}"
        )
    for key in KEYS:
        if content.get(key) == _PLACEHOLDER:
            raise ValueError(f"{label}: {key} is to be given: --{key} VALUE")
    missing = [key for key in REQUIRED if content.get(key) in (None, "", [])]
    if missing:
        raise ValueError(
            f"{label}: lacks {', '.join(missing)}; write it into the file or "
            f"say --{missing[0]} VALUE"
        )
    for key in LISTS:
        if isinstance(content.get(key), str):
            content[key] = [content[key]]
    _check_kinds(label, content)
    return MergePlan(**content)


def parse_overrides(words):
    """Read `--key value` and `--key=value`, SpeechBrain's overrides.

    Arguments
    ---------
    words : list of str
        What the parser did not know.

    Returns
    -------
    list of tuple
        `(key, value)`; values are read as YAML.

    Raises
    ------
    ValueError
        A word that belongs to no key.

    Example
    -------
    >>> parse_overrides(["--rule.density", "0.5", "--finetuned=[a, b]"])
    [('rule.density', 0.5), ('finetuned', ['a', 'b'])]
    """
    import yaml

    found, words = [], list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if not key.startswith("--") or (not equals and not words):
            raise ValueError(
                f"{word}: expected --key value or --key=value, as overrides "
                "of the merge file"
            )
        value = value if equals else words.pop(0)
        try:
            found.append((key[2:], yaml.safe_load(value)))
        except yaml.YAMLError:
            raise ValueError(f"{key}: {value!r} is no YAML value") from None
    return found


def _load(path):
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values, and SpeechBrain's mark for what is to be given."""

    Loader.add_constructor(_PLACEHOLDER, lambda *_: _PLACEHOLDER)
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader)  # noqa: S506 (a SafeLoader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1
        raise ValueError(
            f"{path}: line {line}: a merge file holds plain values, no tags "
            f"({error.problem}); write a rule as rule: {{name: TIES, "
            "density: 0.2}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path}: expected a mapping with {', '.join(REQUIRED)}, found "
            f"{type(content).__name__}"
        )
    return dict(content)


def _set(content, key, value):
    head, dot, rest = key.partition(".")
    if not dot:
        content[head] = value
        return
    inner = content.get(head)
    if isinstance(inner, str) and head == "rule":
        inner = {"name": inner}
    if not isinstance(inner, Mapping):
        raise ValueError(
            f"--{key}: {head!r} is no mapping in the merge file, so it has "
            f"no {rest!r}"
        )
    content[head] = dict(inner)
    _set(content[head], rest, value)


def _check_kinds(label, content):
    kinds = {
        "base": str,
        "output": str,
        "recoverable": (str, type(None)),
        "device": str,
        "finetuned": list,
        "rule": (str, Mapping),
        "scale": (int, float, Mapping, type(None)),
        "threads": (int, type(None)),
        "memory_limit": (int, str, type(None)),
        "include": list,
        "exclude": list,
        "buffers": str,
        "any_base": bool,
        "fingerprint": bool,
    }
    for key, value in content.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(
                f"{label}: {key} is a {type(value).__name__} ({value!r}), "
                "which it cannot be"
            )
    for key in LISTS:
        for entry in content.get(key, ()):
            if not isinstance(entry, str):
                raise ValueError(
                    f"{label}: {key}: expected a list of texts, got {entry!r}"
                )
