"""`taskarith rules`: the merging rules, their arguments and papers."""

import inspect
import re
import textwrap

from speechbrain_taskarith.commands import arguments as shared
from speechbrain_taskarith.commands.output import Result
from speechbrain_taskarith.vectors.rules.description import (
    RULES,
    known_name,
    rule_class,
)

_EXAMPLES = """\
  taskarith rules
  taskarith rules TIES
  taskarith rules --json
"""
# "Yadav et al. 2023 (arXiv 2306.01708, ...", "(Shoemake 1985)"
_PAPER = re.compile(
    r"([A-Z]\w+(?: et al\.| and [A-Z]\w+)? (?:19|20)\d\d)"
    r"(?:,? \(?(arXiv \d{4}\.\d{5}))?"
)


def add_parser(verbs, summary):
    """Add the verb's parser."""
    parser = shared.add_verb(verbs, "rules", summary, _EXAMPLES, run)
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show one rule in full"
    )


def run(options):
    """List all rules, or show one."""
    names = RULES if options.name is None else [known_name(options.name)]
    facts = [_facts(name) for name in names]
    lines = []
    for rule in facts:
        lines.append(f"{rule['rule']}{rule.pop('signature')}")
        if options.name is None:
            text = f"{rule['summary']} {rule['paper']}"
            lines += textwrap.wrap(
                text, 79, initial_indent="    ", subsequent_indent="    "
            )
        else:
            lines += ["", *rule["help"].splitlines()]
    if options.name is None:
        lines += ["", "`taskarith rules NAME` shows one in full."]
    return Result(lines, {"verb": "rules", "rules": facts})


def _facts(name):
    kind = rule_class(name)
    text, signature = inspect.getdoc(kind), inspect.signature(kind)
    paper = _PAPER.search(" ".join(text.split()))
    return {
        "rule": name,
        "signature": str(signature),
        "summary": text.partition("\n")[0],
        "paper": ", ".join(filter(None, paper.groups())),
        "arguments": [
            {"name": p.name, "required": True}
            if p.default is p.empty
            else {"name": p.name, "required": False, "default": p.default}
            for p in signature.parameters.values()
        ],
        "help": text,
    }
