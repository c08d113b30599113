"""`taskarith fragments`: the YAML fragments that the plugin ships."""

import re
import textwrap
from pathlib import Path

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import Result, listed
from speechbrain_taskarith.fragments import (
    fragment_name,
    fragment_names,
    fragment_path,
    fragments_folder,
)
from speechbrain_taskarith.utils.files import atomic_write

_EXAMPLES = """\
  taskarith fragments
  taskarith fragments models/looking_back
  taskarith fragments --copy hparams                    # all of them
  taskarith fragments --copy hparams transducer/emformer_medium

In a YAML, without a copy:
  reduction: !apply:speechbrain_taskarith.fragment
      name: models/looking_back
      pooling: weighted
  modules:
      looking_back: !ref <reduction.looking_back>
"""


def add_parser(verbs, summary):
    """Add the verb's parser."""
    parents = [shared.writing(dry_run_only=True)]
    parser = shared.add_verb(
        verbs, "fragments", summary, _EXAMPLES, run, parents
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="fragments to show or copy")
    add("--copy", metavar="DIR", help="copy them into DIR, to edit them")
    add(
        "--overwrite",
        action="store_true",
        help="replace copies that are there (atomically)",
    )


def run(options):
    """List, show or copy fragments."""
    if not options.copy and (options.overwrite or options.dry_run):
        raise ValueError("--overwrite and --dry-run are for --copy DIR")
    paths = [fragment_path(n) for n in options.names or fragment_names()]
    facts = [_facts(path) for path in paths]
    lines, data = [], {"verb": "fragments", "fragments": facts}
    if options.copy:
        lines, data["copies"] = _copy(paths, options)
        data["dry_run"] = options.dry_run
    elif options.names:
        lines = [fact["text"] for fact in facts]
    else:
        for fact in facts:
            lines += [fact["name"], *_indented(fact["summary"])]
        lines += ["", "`taskarith fragments NAME` shows one in full."]
    return Result(lines, data)


def _copy(paths, options):
    """Copy all or nothing; return lines and the copies' paths."""
    targets = [
        Path(options.copy) / path.relative_to(fragments_folder())
        for path in paths
    ]
    there = [str(target) for target in targets if target.exists()]
    if there and not options.overwrite:
        raise FileExistsError(
            f"{listed(there)}: exists already; name another folder or use "
            "--overwrite"
        )
    verb = "would write" if options.dry_run else "wrote"
    if not options.dry_run:
        for path, target in zip(paths, targets):
            with atomic_write(target) as stream:
                stream.write(path.read_bytes())
    copies = [str(target) for target in targets]
    return [f"{verb} {copy}" for copy in copies], copies


def _facts(path):
    import yaml

    text = path.read_text(encoding="utf-8")
    header = re.match(r"(?:#.*\n)+", text)[0]
    words = " ".join(re.sub(r"^[# ]+", "", header, flags=re.M).split())
    keys = yaml.compose(text, yaml.BaseLoader).value
    return {
        "name": fragment_name(path),
        "summary": re.split(r"(?<=\.)\s", words)[0],
        "keys": [key.value for key, _ in keys],
        "path": str(path),
        "text": text,
    }


def _indented(text):
    indent = "    "
    return textwrap.wrap(
        text,
        79,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
