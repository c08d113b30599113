"""Options that several verbs share, and what their texts mean."""

import argparse
import contextlib
import difflib
import re
import textwrap
from pathlib import Path

from speechbrain_taskarith.utils.hub.cards import card_path, checked_front
from speechbrain_taskarith.utils.patterns import matches
from speechbrain_taskarith.vectors.engine.vector_header import (
    read_vector_header,
)
from speechbrain_taskarith.vectors.states.readers import (
    check_no_input,
    form_of,
)
from speechbrain_taskarith.vectors.states.writers import check_replaced

# What is read and edited, in the same way by all verbs.
_READING = {
    "recoverable": {
        "metavar": "NAME",
        "help": "name of the weights in SpeechBrain checkpoints (model); "
        "NAME,NAME or all: several networks at once",
    },
    "include": {
        "nargs": "+",
        "metavar": "PATTERN",
        "help": "shell patterns, on whole names, of the parameters to take "
        "(all)",
    },
    "exclude": {
        "nargs": "+",
        "metavar": "PATTERN",
        "help": "patterns of the parameters to leave out",
    },
    "any-base": {
        "action": argparse.BooleanOptionalAction,
        "help": "accept vectors that were taken from other weights than the "
        "base",
    },
    "threads": {
        "type": int,
        "metavar": "N",
        "help": "CPU threads (one a core)",
    },
}
# What some verbs have besides.
_MORE = {
    "dtype": {
        "metavar": "TYPE",
        "help": "type of the floating point tensors written, e.g. float32 "
        "(the base's; half precision rounds small edits away)",
    },
    "rename": {
        "nargs": "+",
        "metavar": "PATTERN=NEW",
        "help": "names of what is fine-tuned, as the base has them; '*' in "
        "NEW stands for what '*' in PATTERN does",
    },
    "prefix": {
        "help": "what stands in front of the names of what is fine-tuned and "
        "not of the base's; its other names are left out",
    },
    "key": {
        "help": "where the weights lie in a file of torch.save, e.g. ema or "
        "model.state_dict (of the files that have it)",
    },
}
# Flags that SpeechBrain users give a value: `--any_base true`.
_FLAGS = ("any-base", "fingerprint")
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def add_verb(
    verbs, name, summary, examples, run, parents=(), about=None, listed=False
):
    """Add a verb's parser, with what every verb has, and return it.

    `listed`: argparse lists it. The list of verbs is the program's own; `edit`
    has its actions listed.
    """
    about = about or f"{summary[0].upper()}{summary[1:]}."
    listed = {"help": summary} if listed else {}
    parser = verbs.add_parser(
        name,
        description=textwrap.fill(about, 79),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=parents,
        **listed,
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON"
    )
    parser.add_argument(
        "--no-progress", action="store_true", help="show no progress bar"
    )
    parser.set_defaults(
        run=run,
        parser=parser,
        takes_overrides=False,
        # What Python calls a remedy, and what the command line calls it.
        remedies={
            "any_base=True": "--any-base",
            "strict=False": "--not-strict",
        },
    )
    return parser


def reading(*chosen):
    """Return the options of verbs that read (or some), as a parent parser."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("what to read and edit")
    for name in chosen or _READING:
        group.add_argument(f"--{name}", **{**_READING, **_MORE}[name])
    return parent


def writing(required=True, dry_run_only=False):
    """Return the options of verbs that write, as a parent parser."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("what to write")
    if not dry_run_only:
        group.add_argument(
            "-o",
            "--output",
            required=required,
            metavar="OUT",
            help="where to write; the form follows from the name",
        )
        group.add_argument(
            "--overwrite",
            action="store_true",
            help="replace what stands under that name (atomically)",
        )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, say what would be written, write nothing",
    )
    return parent


def rule_and_scale(default):
    """Return `--rule` and `--scale`, as a parent parser."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("how to merge")
    group.add_argument(
        "--rule",
        nargs="+",
        metavar=("NAME", "KEY=VALUE"),
        help="merging rule and its arguments, e.g. TIES density=0.5 "
        f"({default}); `taskarith rules` lists all",
    )
    group.add_argument(
        "--scale",
        nargs="+",
        metavar="SCALE",
        help="a number, or PATTERN=NUMBER ...; the first match wins, "
        "parameters without a match stay as they are",
    )
    return parent


def plain_spelling(words):
    """Bring SpeechBrain's way to write options to the command line's.

    Example
    -------
    >>> plain_spelling(["--rule.density", "0.3", "--any_base", "true"])
    ['--rule.density=0.3', '--any-base']
    """
    plain, words = [], list(words)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        flag = option.removeprefix("--").replace("_", "-")
        if option.startswith("--") and flag in _FLAGS:
            if not equals and words and words[0].lower() in _TRUTH:
                equals, value = "=", words.pop(0)
            if not equals or value.lower() in _TRUTH:
                on = _TRUTH.get(value.lower(), True)
                word = f"--{flag}" if on else f"--no-{flag}"
        elif option.startswith("--") and "." in option and not equals and words:
            word = f"{option}={words.pop(0)}"
        plain.append(word)
    return plain


def take_overrides(options, rest):
    """Keep `--key.key=value` for the verb that takes them, refuse the rest."""
    options.overrides, known = [], options.parser._option_string_actions
    # A word that is no option may be the value of one that is none.
    for word in sorted(rest, key=lambda word: not word.startswith("-")):
        option = word.partition("=")[0]
        head, dot, _ = option.partition(".")
        if options.takes_overrides and dot and head in known:
            options.overrides.append(word)
        elif word.startswith("-"):
            near = difflib.get_close_matches(head, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            options.parser.error(f"unknown option {option}; {hint}")
        else:
            options.parser.error(f"unexpected argument {word!r}")


def rule_words(words):
    """Return what `--rule NAME KEY=VALUE ...` means; values are YAML.

    Example
    -------
    >>> rule_words(["DARE", "drop=0.9", "then={name: TIES, density: 1}"])
    {'name': 'DARE', 'drop': 0.9, 'then': {'name': 'TIES', 'density': 1}}
    """
    import yaml

    description = {"name": words[0]}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(
                f"--rule {words[0]} {word}: expected KEY=VALUE after the name"
            )
        try:
            description[key] = read_yaml(value)
        except yaml.YAMLError:
            raise ValueError(
                f"--rule {word}: the value is not valid YAML"
            ) from None
    return description


def read_yaml(text, constructors=None):
    """Read plain YAML, in which `5e-1` is a number as in HyperPyYAML.

    Example
    -------
    >>> read_yaml("{density: 5e-1, name: e1}")
    {'density': 0.5, 'name': 'e1'}
    """
    import yaml

    loader = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    starts = list("-+.0123456789")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, starts)
    for tag, constructor in (constructors or {}).items():
        loader.add_constructor(tag, constructor)
    return yaml.load(text, loader)  # noqa: S506 (a SafeLoader)


def rule_of(words, scale=None):
    """Make the rule of `--rule`."""
    from speechbrain_taskarith.vectors.rules.description import from_plain

    return from_plain(rule_words(words), scale)


def scale_of(texts, option="--scale"):
    """Return what `--scale` means: a number, `{pattern: number}` or None.

    Example
    -------
    >>> scale_of(["0.4"]), scale_of(["encoder.*=0.4", "*=0.1"])
    (0.4, {'encoder.*': 0.4, '*': 0.1})
    """
    scale = {}
    for text in texts or ():
        pattern, equals, value = text.rpartition("=")
        if not pattern and (equals or len(texts) > 1):
            raise ValueError(
                f"{option} {text}: expected one number, or PATTERN=NUMBER "
                "(in quotes, so that the shell leaves the '*' alone)"
            )
        try:
            scale[pattern] = float(value)
        except ValueError:
            raise ValueError(
                f"{option}: expected a number, got {value!r}"
            ) from None
    # Without a pattern it is one number, or none.
    return scale if any(scale) else scale.get("")


def open_weights(path, options):
    """Open weights that a verb reads; lazy, not yet verified."""
    from speechbrain_taskarith.vectors import open_state

    return open_state(path, recoverable=options.recoverable)


def open_models(base, others, options):
    """Open a base and what was fine-tuned from it, as they are to be read.

    `options` may have a `key`, a `prefix`, and a `rename` by pattern. Each
    must fit one of the files at least, not all.
    """
    base, *states = open_at_key([base, *others], options)
    if options.rename or options.prefix:
        from speechbrain_taskarith.vectors import TaskVector

        # A file's tensors may have other names than a vector's parameters.
        states = [
            state
            if read_vector_header(state) is None
            else TaskVector.load(path)
            for path, state in zip(others, states)
        ]
    return [base, *renamed(states, others, options)]


def open_at_key(paths, options):
    """Open weights that lie under a key in one of some files at least."""
    states, unfit = [], []
    for path in paths:
        try:
            states.append(_open_at(path, options, options.key))
        except (KeyError, ValueError) as error:
            if options.key is None:
                raise
            unfit.append(error)
            try:
                states.append(_open_at(path, options, None))
            except (KeyError, ValueError):
                # Most often the key is misspelt.
                raise error from None
    if len(unfit) == len(states):
        raise unfit[-1]
    return states


def renamed(states, paths, options):
    """Return states or vectors under a base's names, as `options` say."""
    table, states = options.rename or {}, list(states)
    unused = {**table, **({options.prefix: ""} if options.prefix else {})}
    for number, state in enumerate(states):
        prefix = options.prefix
        if not (prefix and any(name.startswith(prefix) for name in state)):
            prefix = None
        unused.pop(prefix, None)
        if prefix:
            state = state.rename(prefix=prefix)
        here = {
            pattern: new
            for pattern, new in table.items()
            if any(matches(name, pattern) for name in state)
        }
        for pattern in here:
            unused.pop(pattern, None)
        states[number] = state.rename(here) if here else state
    if unused:
        raise ValueError(
            f"{next(iter(unused))!r} fits no name of {', '.join(paths)}; "
            "look at them with `taskarith inspect --tensors`"
        )
    return states


def _open_at(path, options, key):
    from speechbrain_taskarith.vectors import open_state

    return open_state(path, recoverable=options.recoverable, key=key)


def rename_of(words):
    """Return what `--rename PATTERN=NEW ...` means, a dict.

    Example
    -------
    >>> rename_of(["*.weight_g=*.scale", "enc.*=encoder.*"])
    {'*.weight_g': '*.scale', 'enc.*': 'encoder.*'}
    """
    table = {}
    for word in words or ():
        pattern, equals, new = word.partition("=")
        if not (pattern and equals):
            raise ValueError(f"--rename {word}: expected PATTERN=NEW")
        table[pattern] = new
    return table


def patterns(options):
    """Return `--include` and `--exclude` with their defaults."""
    return {
        "include": options.include or ["*"],
        "exclude": options.exclude or [],
    }


@contextlib.contextmanager
def threads(options):
    """Let torch use `--threads` threads."""
    if options.threads is None:
        yield
        return
    from speechbrain_taskarith.vectors.checks import MOST_THREADS

    if not 1 <= options.threads <= MOST_THREADS:
        raise ValueError(
            f"--threads {options.threads}: expected 1 to {MOST_THREADS}"
        )
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_output(output, inputs, overwrite, suffixes=None, what=None):
    """Return the output's path; refuse one that would harm what is there."""
    output = Path(output)
    check_no_input(output, inputs)
    form = form_of(output) if suffixes is None else None
    if form is None and output.suffix.lower() not in suffixes:
        raise ValueError(
            f"{output}: {what} is stored as {', '.join(suffixes)}; name it so"
        )
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"{output}: exists already; choose another name or use --overwrite"
        )
    check_replaced(output, form)
    a_file = form in ("safetensors", "torch") or ".safetensors" in (
        suffixes or ()
    )
    if a_file or (form and output.is_dir()):
        # The card's: before the work, and before weights are replaced.
        checked_front(card_path(output), {})
    return output
