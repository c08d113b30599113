"""The rows of the study: base, baselines, adapters, combinations."""

import copy

import torch
from speechbrain.nnet.adapters import AdaptedModel, LoRA
from stages import Row, Trainer

from speechbrain_taskarith.utils.progress import progress
from speechbrain_taskarith.vectors import open_state

SHARED = "shared"
MODES = {"st": "ST-A", "mt": "MT-A"}
# Routing's row, by where the tasks' adapters started.
ROUTING = {"fresh": "routing", "shared": "routing_from_shared"}


class Study(Trainer):
    """Trains and measures everything of one seed; see `Trainer`."""

    def run(self):
        """Train and measure.

        Returns
        -------
        dict
            `rows` (`{name: Row}`), `zero_shot` (the same, a task's WER being
            that of the models that have not seen it), `parameters` (of the
            base), `bytes` (size of an adapter's file) and `unharmed` (whether
            a fifth adapter left the first four as they were).
        """
        names, zero_shot = self.tasks.names, list(self.hparams["zero_shot"])
        total = 4 + len(names) * (4 + len(zero_shot))
        total += len(self.hparams["compositions"])
        self.bar = iter(progress(range(total), desc="trainings"))
        base = self.train_base()
        rows = {"base": self.measure(None, base)}
        rows["full_fine_tuning"] = self.full_fine_tuning("full", names, base)
        rows.update(self.task_by_task(base))
        rows["lora"] = self.lora(base)
        extracted = {}
        for start, routing in ROUTING.items():
            extracted[start], seconds = self.extract(base, start)
            found = self.measure("own", extracted[start])
            found.trained = self.adapters.count_parameters()["adapters"]
            found.seconds = seconds
            rows[routing] = found
        size = self.save_adapters(extracted["fresh"])
        for name, settings in self.hparams["compositions"].items():
            start = settings["adapters"]
            rows[name] = self.compose(name, name, names, extracted[start])
            rows[name].seconds += rows[ROUTING[start]].seconds
        extracted = extracted["fresh"]
        held = self.zero_shot(base, extracted, zero_shot)
        shared, unharmed = self.shared(extracted)
        rows["shared_adapter"] = shared
        next(self.bar, None)
        return {
            "rows": rows,
            "zero_shot": held,
            "parameters": self.base_parameters(),
            "bytes": size,
            "unharmed": unharmed,
        }

    def train_base(self):
        """Train the base from random weights, or take another run's.

        Returns
        -------
        dict of str to torch.Tensor
            Its weights, with adapters that do nothing yet.
        """
        start = self.state()
        if self.hparams["base"] is not None:
            next(self.bar, None)
            given = dict(open_state(self.hparams["base"]))
            own = self.handle_name() + "."
            missing = [k for k in start if own not in k and k not in given]
            if missing:
                raise ValueError(
                    f"base: {self.hparams['base']} lacks {missing[0]!r} and "
                    f"{len(missing) - 1} others; expected kept.safetensors of "
                    "a base of this model"
                )
            return {k: v if own in k else given[k] for k, v in start.items()}
        return self.train("base", None, start, self.base_only, "base", None)[0]

    def full_fine_tuning(self, folder, names, base, measured=None):
        """Fine-tune every parameter of the base on some tasks.

        Arguments
        ---------
        folder : str
            Under `save`.
        names : list of str
            The tasks.
        base : dict of str to torch.Tensor
            Where it starts.
        measured : list of str, optional
            The tasks that are measured; all by default.

        Returns
        -------
        Row
            The result.
        """
        state, count, seconds = self.train(
            folder, names, base, self.base_only, "full_fine_tuning", None
        )
        return self.measure(None, state, count, seconds, measured)

    def task_by_task(self, base):
        """Fine-tune everything on one task at a time.

        Arguments
        ---------
        base : dict of str to torch.Tensor
            Where it starts.

        Returns
        -------
        dict
            `full_fine_tuning_each`: a model of its own for each task, which
            has to be told, as routing is; `full_fine_tuning_in_turn`: one
            model that learns task after task and forgets.
        """
        each, turn = Row({}), base
        in_turn = Row({}, 0, 0.0)
        for name in self.tasks.names:
            state, count, seconds = self.train(
                f"full_{name}",
                [name],
                base,
                self.base_only,
                "full_fine_tuning_each",
                None,
            )
            self.model.load_state_dict(state)
            with self.adapters.use(None):
                each.wer[name] = self.wer_of(name)
            each.trained += count
            each.seconds += seconds
            if turn is base:  # the first task has nothing to forget
                turn = state
                in_turn.trained, in_turn.seconds = count, seconds
                continue
            turn, _, seconds = self.train(
                f"full_until_{name}",
                [name],
                turn,
                self.base_only,
                "full_fine_tuning_each",
                None,
            )
            in_turn.seconds += seconds
        in_turn.wer = self.measure(None, turn).wer
        return {
            "full_fine_tuning_each": each,
            "full_fine_tuning_in_turn": in_turn,
        }

    def lora(self, base):
        """Train low-rank additions to all linear layers (SpeechBrain's).

        Arguments
        ---------
        base : dict of str to torch.Tensor
            Where it starts.

        Returns
        -------
        Row
            Measured on all tasks.
        """
        self.model.load_state_dict(base)
        plain = copy.deepcopy(self.model)
        handle = plain.get_submodule(self.handle_name())
        handle.remove()
        self.seed_for("lora")
        adapted = AdaptedModel(
            plain,
            adapter_class=LoRA,
            all_linear=True,
            adapter_kwargs={"rank": self.hparams["lora_rank"]},
        )
        trained = [p for p in adapted.parameters() if p.requires_grad]
        with self.other_model(adapted):
            state, count, seconds = self.train(
                "lora",
                self.tasks.names,
                {k: v.clone() for k, v in adapted.state_dict().items()},
                lambda: trained,
                "lora",
                None,
            )
            adapted.load_state_dict(state)
            wer = {name: self.wer_of(name) for name in self.tasks.names}
        return Row(wer, count, seconds)

    def extract(self, base, start):
        """Knowledge extraction: train each task's adapter alone.

        Arguments
        ---------
        base : dict of str to torch.Tensor
            The base, and adapters that do nothing yet.
        start : str
            `"fresh"`: adapters that do nothing, as in the paper;
            `"shared"`: one adapter that all tasks have trained together
            first.

        Returns
        -------
        dict of str to torch.Tensor, float
            Base and trained adapters; seconds.
        """
        names, total, row = self.tasks.names, 0.0, "extraction"
        prefix = ""
        if start == "shared":
            first, prefix, row = names[0], "from_shared_", "from_shared"
            together, _, total = self.train(
                "extraction_together",
                names,
                base,
                lambda: self.adapters.train_extraction(first),
                "extraction_together",
                first,
            )
            base = dict(base)
            for key, moved in self._moved(together, base).items():
                for name in names:
                    like = key.replace(f"adapter_{first}.", f"adapter_{name}.")
                    base[like] = moved
        state = dict(base)
        for name in names:
            one, _, seconds = self.train(
                f"extraction_{prefix}{name}",
                [name],
                base,
                lambda name=name: self.adapters.train_extraction(name),
                row,
                name,
            )
            total += seconds
            state.update(self._moved(one, base))
        return state, total

    @staticmethod
    def _moved(state, before):
        """Return what training has moved: one adapter."""
        return {
            key: value
            for key, value in state.items()
            if not torch.equal(value, before[key])
        }

    def compose(self, folder, row, names, extracted, measured=None):
        """Knowledge composition: train a combination on some tasks.

        Arguments
        ---------
        folder : str
            Under `save`.
        row : str
            Which of `compositions`.
        names : list of str
            The tasks, whose adapters are combined.
        extracted : dict of str to torch.Tensor
            Base and trained adapters.

        measured : list of str, optional
            The tasks that are measured; all by default.

        Returns
        -------
        Row
            The result; seconds are of composition alone.
        """
        settings = self.hparams["compositions"][row]
        self.model.load_state_dict(extracted)
        self.seed_for(folder)
        self.adapters.set_combination(settings["combination"], names=names)
        mode = MODES[settings["mode"]]
        chosen = self.adapters.train_composition(mode)
        state, seconds = self.state(), 0.0
        if chosen:
            state, _, seconds = self.train(
                folder,
                names,
                state,
                lambda: self.adapters.train_composition(mode),
                row,
                "combined",
            )
        else:  # a plain mean has nothing to train
            next(self.bar, None)
        counts = self.adapters.count_parameters()
        count = counts["adapters"] * len(names) // len(self.tasks.names)
        count += counts["combination"]
        found = self.measure("combined", state, count, seconds, measured)
        self.adapters.save_combination(self.folder / f"{folder}.safetensors")
        # What was frozen has kept its bytes.
        kept = [k for k in extracted if mode == "ST-A" or "bank" not in k]
        for key in kept:
            if not torch.equal(state[key].cpu(), extracted[key].cpu()):
                raise RuntimeError(f"{folder}: {key} was frozen and has moved")
        self.adapters.set_combination(None)
        return found

    def zero_shot(self, base, extracted, rows):
        """Leave each task out in turn; measure it all the same.

        Arguments
        ---------
        base : dict of str to torch.Tensor
            The base.
        extracted : dict of str to torch.Tensor
            Base and trained adapters.
        rows : list of str
            `full_fine_tuning` or names of `compositions`.

        Returns
        -------
        dict
            `{name: Row}`.
        """
        found = {row: Row({}) for row in rows}
        for left_out in self.tasks.names:
            others = [name for name in self.tasks.names if name != left_out]
            for row in rows:
                folder, only = f"without_{left_out}_{row}", [left_out]
                if row == "full_fine_tuning":
                    result = self.full_fine_tuning(folder, others, base, only)
                else:
                    result = self.compose(folder, row, others, extracted, only)
                found[row].wer[left_out] = result.wer[left_out]
                found[row].trained = result.trained
                found[row].seconds += result.seconds / len(self.tasks.names)
        return found

    def shared(self, extracted):
        """Add a wide adapter for all tasks, the fifth of the bank.

        Arguments
        ---------
        extracted : dict of str to torch.Tensor
            Base and trained adapters.

        Returns
        -------
        Row, bool
            Its row; whether the outputs through the first adapters are the
            same bytes as before.
        """
        self.model.load_state_dict(extracted)
        before = [self.outputs(name) for name in self.tasks.names]
        self.seed_for(SHARED)
        self.adapters.add_adapter(SHARED, self.hparams["shared_bottleneck"])
        start = {**self.state(), **extracted}
        state, count, seconds = self.train(
            SHARED,
            self.tasks.names,
            start,
            lambda: self.adapters.train_extraction(SHARED),
            "shared_adapter",
            SHARED,
        )
        found = self.measure(SHARED, state, count, seconds)
        after = [self.outputs(name) for name in self.tasks.names]
        same = all(torch.equal(a, b) for a, b in zip(before, after))
        self.adapters.use(None)
        self.adapters.remove_adapter(SHARED)
        return found, same

    def save_adapters(self, extracted):
        """Save every adapter as a file of its own.

        Arguments
        ---------
        extracted : dict of str to torch.Tensor
            Base and trained adapters.

        Returns
        -------
        int
            Bytes of one of them.
        """
        self.model.load_state_dict(extracted)
        folder = self.folder / "adapters"
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.tasks.names:
            path = folder / f"{name}.safetensors"
            self.adapters.save_adapter(name, path)
        return path.stat().st_size
