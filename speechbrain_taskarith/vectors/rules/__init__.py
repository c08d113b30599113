"""All merging rules, one file a rule or family.

A rule is a small object that holds numbers only, built in Python or by
`!new:` in YAML, and used as `rule(base, [tau, ...])`, `rule.combine([tau,
...])` or by `merge_checkpoints`. `base` says what a rule is, `reference`
shows each in a few lines of torch, `description` makes rules by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
