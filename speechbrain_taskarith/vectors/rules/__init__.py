"""All merging rules, one file a rule, in a folder a family.

A rule is a small object that holds numbers only, built in Python or by
`!new:` in YAML, and used as `rule(base, [tau, ...])`, `rule.combine([tau,
...])` or by `merge_checkpoints`. `base` says what a rule is, `reference`
shows each in a few lines of torch, `description` makes rules by name and says
which file each is in.

- `averaging`: task arithmetic, the model soup, Fisher averaging
- `sparsifying`: TIES, DARE, DELLA, Breadcrumbs, PCB, SCE
- `geometric`: SLERP, MultiSLERP, Karcher, Model Stock
- `spectral`: TSV-M, Iso-C and their variants
- `by_layer`: LiNeS, another rule for each group of layers, selective attention
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
