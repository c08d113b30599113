"""All merging rules by name.

Each is a small object that holds numbers only, to be built in Python or by
`!new:` in YAML, and used as `rule(base, [tau, ...])`, `rule.combine([tau,
...])` or by `merge_checkpoints`. `rule.Rule` says what a rule is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
