"""Ways to learn one domain after another: what editing is compared with.

A method is a small object that a training loop calls (`FineTuning` says when);
it knows nothing of Brains, data sets or files. The first task is the one that
the first model learned; methods act from the second on.

Here: methods that act on weights. Those that store recordings are in
`memory`, those that add to the loss in `penalties`.
"""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)

from speechbrain_taskarith.utils.files import atomic_write
from speechbrain_taskarith.utils.messages import some
from speechbrain_taskarith.utils.patterns import (
    as_tuple,
    matches,
    require_match,
)


@register_checkpoint_hooks
class FineTuning:
    """Train on the new domain and do nothing against forgetting.

    Also the base class of the other methods: each overrides only what it
    does differently. A training loop calls, in this order:

    1. `before_task(model, task)`: `model`, never a DDP-wrapped one, is about
       to learn its `task`-th domain (counted from 1) and still holds the
       weights of the ones before.
    2. `freeze(model)`, before the optimizer is made: sets `requires_grad` by
       `trainable(name)` and returns the trainable names.
    3. `items(new, task)`: the utterances to train on, given the domain's own;
       an utterance is any plain description that JSON can hold.
       `extra_items(count, draw)`: old utterances to add to a batch of `count`;
       the same number `draw` of a batch gives the same utterances.
    4. `penalty(model, forward, log_probs, lens)`: a scalar to add to the loss
       of a batch, or None. `log_probs` [batch, time, classes] is the model's
       output, `lens` [batch] are relative lengths in (0, 1], and
       `forward(model) -> log_probs` runs another copy on the same batch.
    5. `after_task(before, finetuned, task)`: which weights to go on with, all
       as `{name: tensor}`. Then `consolidate(model, items, loss)` with these
       weights in the model; `loss(item)` is the negative log-likelihood of one
       utterance under the model, with gradient.

    `state_dict` gives what passes from task to task: tensors, and what JSON
    can hold. SpeechBrain's checkpointer stores it through `save` and `load`.

    Example
    -------
    >>> method = FineTuning()
    >>> model = torch.nn.Linear(2, 1)
    >>> method.before_task(model, task=2)
    >>> method.freeze(model)
    ['weight', 'bias']
    >>> method.items(["new utterance"], task=2), method.extra_items(4, draw=0)
    (['new utterance'], [])
    >>> method.after_task({"weight": 1.0}, {"weight": 2.0}, task=2)
    {'weight': 2.0}
    """

    #: Whether recordings of earlier domains are used again. A table must say
    #: so: such a row had more data than the others.
    uses_old_data = False

    #: Whether training itself differs from plain fine-tuning. Where it does
    #: not, methods that start from the same weights can share one training.
    changes_training = False

    def before_task(self, model, task):
        """Prepare for a new domain."""

    def trainable(self, name):
        """Tell whether a parameter may change; here every one."""
        return True

    def freeze(self, model):
        """Set `requires_grad`; return the trainable names, at least one."""
        parameters = dict(model.named_parameters())
        names = [name for name in parameters if self.trainable(name)]
        if not names:
            raise ValueError(
                f"{type(self).__name__} leaves no parameter to train; the "
                f"model's names look like {next(iter(parameters), 'nothing')}"
            )
        for name, parameter in parameters.items():
            parameter.requires_grad_(self.trainable(name))
        return names

    def items(self, new, task):
        """Return the utterances to train on; here the new ones."""
        return list(new)

    def extra_items(self, count, draw):
        """Return old utterances to add to a batch; here none."""
        return []

    def penalty(self, model, forward, log_probs, lens):
        """Return a term to add to the loss of a batch; here None."""
        return None

    def after_task(self, before, finetuned, task):
        """Return the weights to go on with; here the fine-tuned ones."""
        return finetuned

    def consolidate(self, model, items, loss):
        """Store what a later task will need."""

    def state_dict(self):
        """Return what passes from task to task."""
        return {}

    def load_state_dict(self, state):
        """Take back what `state_dict` of the same class returned."""
        if state:
            raise ValueError(
                f"{type(self).__name__} has no state, but was given "
                f"{', '.join(sorted(state))}: the state of another method?"
            )

    @mark_as_saver
    def save(self, path):
        """Write the state (safetensors, atomically); SpeechBrain calls this."""
        plain = self.state_dict()
        tensors = {
            name: plain.pop(name).detach().cpu().contiguous()
            for name, value in list(plain.items())
            if isinstance(value, torch.Tensor)
        }
        metadata = {"method": type(self).__name__, "plain": json.dumps(plain)}
        with atomic_write(path) as stream:
            stream.write(to_safetensors(tensors, metadata))

    @mark_as_loader
    def load(self, path, end_of_epoch=True):
        """Read what `save` of the same class wrote; SpeechBrain calls this."""
        del end_of_epoch
        try:
            with safe_open(str(path), "pt") as stream:
                metadata = stream.metadata() or {}
                state = {n: stream.get_tensor(n) for n in list(stream.keys())}
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path}: not the memory of a lifelong method, or damaged "
                f"({error}). Delete it and run the last task again."
            ) from None
        if metadata.get("method") != type(self).__name__:
            raise ValueError(
                f"{path}: memory of {metadata.get('method')!r}, expected that "
                f"of {type(self).__name__!r}; give each method its own folder"
            )
        state.update(json.loads(metadata["plain"]))
        self.load_state_dict(state)


class Averaging(FineTuning):
    """Average the weights before and after each task.

    `theta_t = (1 - w_t) theta_{t-1} + w_t theta_hat_t`: task arithmetic with
    a fixed scale, or with `1 / t`: the plain mean of all fine-tuned models.

    Arguments
    ---------
    weight : float or str
        Weight of the newly fine-tuned model in [0, 1], or `"1/t"` with `t`
        the number of the domain.

    Example
    -------
    >>> before, after = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    >>> Averaging(0.5).after_task(before, after, task=4)["w"].item()
    0.5
    >>> Averaging("1/t").after_task(before, after, task=4)["w"].item()
    0.25
    """

    def __init__(self, weight=0.5):
        self.weight = weight if weight == "1/t" else float(weight)
        if weight != "1/t" and not 0.0 <= self.weight <= 1.0:
            raise ValueError(
                f"weight is {weight}, expected 0 to 1 or the text '1/t'"
            )

    def after_task(self, before, finetuned, task):
        """As `FineTuning.after_task`; integers and booleans stay."""
        if odd := before.keys() ^ finetuned.keys():
            raise ValueError(
                f"{some(sorted(odd))} on one side only; both must be states "
                "of one model"
            )
        weight = 1.0 / task if self.weight == "1/t" else self.weight
        result = {}
        for name, old in before.items():
            if torch.is_floating_point(old):
                wide = torch.promote_types(old.dtype, torch.float32)
                new = finetuned[name].to(wide)
                result[name] = old.to(wide).lerp(new, weight).to(old.dtype)
            else:
                result[name] = old.clone()
        return result


class PartialUpdate(FineTuning):
    """Train only the parameters that fit a pattern; all others stay.

    With the encoder's pattern this is the "encoder-only" baseline of
    lifelong speech recognition (Takashima et al. 2022 and others).

    Arguments
    ---------
    patterns : str or sequence of str
        Anchored shell patterns on whole names, e.g. `"encoder.*"`.

    Example
    -------
    >>> model = torch.nn.ModuleDict(
    ...     {"encoder": torch.nn.Linear(2, 2), "ctc_lin": torch.nn.Linear(2, 3)}
    ... )
    >>> PartialUpdate("encoder.*").freeze(model)
    ['encoder.weight', 'encoder.bias']
    """

    changes_training = True

    def __init__(self, patterns="encoder.*"):
        self.patterns = as_tuple(patterns)

    def trainable(self, name):
        """As `FineTuning.trainable`: True where a pattern fits."""
        return any(matches(name, pattern) for pattern in self.patterns)

    def freeze(self, model):
        """As `FineTuning.freeze`; every pattern must fit a parameter."""
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.patterns:
            require_match(names, pattern)
        return super().freeze(model)
