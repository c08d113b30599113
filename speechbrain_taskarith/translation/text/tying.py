"""One tensor under two names."""

import torch


def tie(module, first, second):
    """Let two parameters of a module be one, that of the first name.

    It is trained and counted once; `torch.save` writes it once, under both
    names. A state dict loads with both names or with one of them; two
    tensors that differ are refused, since only one of them could be kept.

    Arguments
    ---------
    module : torch.nn.Module
        Holds both.
    first, second : str
        The parameters' names in it.
    """
    kept = module.get_parameter(first)
    owner, _, name = second.rpartition(".")
    found = module.get_parameter(second)
    if found.shape != kept.shape:
        raise ValueError(
            f"{first} {tuple(kept.shape)} and {second} {tuple(found.shape)} "
            "cannot be tied: they need one shape"
        )
    setattr(module.get_submodule(owner), name, kept)
    module.register_load_state_dict_pre_hook(_OneOfTwo(first, second))


class _OneOfTwo:
    """Fill in the name that is missing, refuse two that differ."""

    def __init__(self, *names):
        self.names = names

    def __call__(self, module, state_dict, prefix, *_):
        names = [prefix + name for name in self.names]
        found = [state_dict[name] for name in names if name in state_dict]
        if len(found) == 2 and not torch.equal(*(t.cpu() for t in found)):
            raise ValueError(
                f"{' and '.join(names)} differ, and are tied in this model; "
                "the checkpoint is of a model without the tie. Take the same "
                "setting for both, or leave one of the two tensors out"
            )
        if len(found) == 1:
            for name in names:
                state_dict.setdefault(name, found[0])
