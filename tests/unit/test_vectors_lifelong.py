"""Lifelong methods against naive formulas in float64."""

import math

import pytest
import torch
from safetensors.torch import save_file
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_taskarith.vectors.lifelong.memory import JointTraining, Replay
from speechbrain_taskarith.vectors.lifelong.methods import (
    Averaging,
    FineTuning,
    PartialUpdate,
)
from speechbrain_taskarith.vectors.lifelong.penalties import EWC, LwF


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict(
        {
            "encoder": torch.nn.Linear(3, 4),
            "ctc_lin": torch.nn.Linear(4, 5),
        }
    )


def run(model, x):
    hidden = torch.tanh(model["encoder"](x))
    return model["ctc_lin"](hidden).log_softmax(-1)


class TestFineTuning:
    def test_keeps_the_finetuned_weights_themselves(self):
        after = {"w": torch.ones(2)}
        kept = FineTuning().after_task({"w": torch.zeros(2)}, after, 2)
        assert kept is after

    def test_adds_nothing_to_the_loss(self):
        assert FineTuning().penalty(network(), None, None, None) is None

    def test_refuses_the_memory_of_another_method(self, tmp_path):
        Replay().save(tmp_path / "memory.ckpt")
        with pytest.raises(ValueError, match="Replay.*FineTuning"):
            FineTuning().load(tmp_path / "memory.ckpt")

    def test_a_damaged_file_is_named(self, tmp_path):
        path = tmp_path / "memory.ckpt"
        Replay().save(path)
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(ValueError, match="memory.ckpt"):
            Replay().load(path)

    def test_a_strange_safetensors_file_is_refused(self, tmp_path):
        save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="memory of None"):
            EWC().load(tmp_path / "model.safetensors")

    def test_a_missing_file_stays_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            EWC().load(tmp_path / "nothing.ckpt")


class TestAveraging:
    @pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
    def test_naive_average(self, weight):
        torch.manual_seed(0)
        old, new = torch.randn(50), torch.randn(50)
        kept = Averaging(weight).after_task({"w": old}, {"w": new}, 3)["w"]
        naive = [
            (1 - weight) * a + weight * b
            for a, b in zip(old.tolist(), new.tolist())
        ]
        assert kept.tolist() == pytest.approx(naive, abs=1e-6)

    def test_one_over_t_is_the_plain_mean_of_all_models(self):
        torch.manual_seed(0)
        models = [torch.randn(7, dtype=torch.float64) for _ in range(5)]
        method, kept = Averaging("1/t"), {"w": models[0]}
        for task, model in enumerate(models[1:], start=2):
            kept = method.after_task(kept, {"w": model}, task)
        mean = torch.stack(models).mean(0)
        assert torch.allclose(kept["w"], mean, atol=1e-12)

    def test_counters_and_half_precision(self):
        before = {"n": torch.tensor(3), "h": torch.ones(1, dtype=torch.half)}
        after = {"n": torch.tensor(9), "h": 2 * torch.ones(1).half()}
        kept = Averaging(0.5).after_task(before, after, 2)
        assert kept["n"].item() == 3
        assert kept["h"].dtype == torch.half and kept["h"].item() == 1.5

    def test_weights_of_another_model_are_refused(self):
        with pytest.raises(ValueError, match="extra"):
            Averaging().after_task({}, {"extra": torch.ones(1)}, 2)

    @pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
    def test_weight_out_of_range(self, weight):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            Averaging(weight)


class TestPartialUpdate:
    def test_only_the_encoder_moves(self):
        model = network()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        names = PartialUpdate("encoder.*").freeze(model)
        assert names == ["encoder.weight", "encoder.bias"]
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(chosen, lr=0.1)
        run(model, torch.randn(2, 6, 3))[..., 0].sum().backward()
        optimizer.step()
        for name, value in model.state_dict().items():
            same = torch.equal(value, before[name])
            assert same == name.startswith("ctc_lin"), name

    def test_the_next_method_thaws_again(self):
        model = network()
        PartialUpdate("encoder.*").freeze(model)
        assert len(FineTuning().freeze(model)) == 4

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(ValueError, match="encodr"):
            PartialUpdate(["encoder.*", "encodr.*"]).freeze(network())

    def test_nothing_left_to_train(self):
        with pytest.raises(ValueError, match="no parameter"):
            PartialUpdate([]).freeze(network())


class TestReplay:
    def test_memory_is_shared_equally_and_bounded(self):
        method = Replay(memory=10)
        for domain in range(4):
            method.consolidate(None, [f"{domain}-{n}" for n in range(20)], None)
            sizes = [len(d) for d in method.memory_by_domain]
            assert sum(sizes) == 10 and max(sizes) - min(sizes) <= 1
        for number, domain in enumerate(method.memory_by_domain):
            assert len(set(domain)) == len(domain)
            assert all(item.startswith(f"{number}-") for item in domain)

    def test_a_smaller_share_is_part_of_the_larger(self):
        method = Replay(memory=8)
        method.consolidate(None, list(range(50)), None)
        first = list(method.memory_by_domain[0])
        method.consolidate(None, list(range(50, 99)), None)
        assert set(method.memory_by_domain[0]) < set(first)

    def test_draws_are_even_repeatable_and_only_old(self):
        method = Replay(memory=9, share=0.5, seed=1)
        assert method.extra_items(8, draw=0) == []
        for name in "abc":
            method.consolidate(None, [f"{name}{n}" for n in range(5)], None)
        counts = dict.fromkeys("abc", 0)
        for draw in range(300):
            items = method.extra_items(12, draw)
            assert len(items) == 6
            assert items == method.extra_items(12, draw)
            for item in items:
                counts[item[0]] += 1
        assert max(counts.values()) - min(counts.values()) == 0

    def test_survives_a_checkpoint(self, tmp_path):
        method = Replay(memory=5, seed=3)
        method.consolidate(None, [{"ID": n, "wrd": "ONE"} for n in "xyz"], None)
        saver = Checkpointer(tmp_path, {"method": method})
        saver.save_checkpoint()
        other = Replay(memory=5, seed=3)
        Checkpointer(tmp_path, {"method": other}).recover_if_possible()
        assert other.memory_by_domain == method.memory_by_domain
        assert other.extra_items(6, 2) == method.extra_items(6, 2)

    @pytest.mark.parametrize("wrong", [{"memory": 0}, {"share": 1.0}])
    def test_refuses_senseless_settings(self, wrong):
        with pytest.raises(ValueError, match="expected"):
            Replay(**wrong)


class TestJoint:
    def test_everything_seen_is_trained_on(self, tmp_path):
        method = JointTraining()
        method.consolidate(None, ["a"], None)
        method.save(tmp_path / "m")
        other = JointTraining()
        other.load(tmp_path / "m")
        assert sorted(other.items(["b"], 2)) == ["a", "b"]
        other.consolidate(None, ["b"], None)
        assert sorted(other.items(["c"], 3)) == ["a", "b", "c"]

    def test_domains_weigh_the_same_and_are_mixed(self):
        method = JointTraining()
        method.consolidate(None, [f"a{n}" for n in range(500)], None)
        items = method.items([f"b{n}" for n in range(40)], 2)
        assert len(items) == len(set(items)) == 80
        assert items == method.items([f"b{n}" for n in range(40)], 2)
        first_half = [item[0] for item in items[:40]]
        assert 8 < first_half.count("a") < 32


class TestEWC:
    def data(self):
        torch.manual_seed(1)
        return [(torch.randn(6, 3), torch.randint(0, 5, (6,))) for _ in "abcd"]

    def naive_fisher(self, model, data):
        """Mean over utterances of squared gradients, in float64."""
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for x, y in data:
            model.zero_grad()
            loss = 0.0
            for frame, label in zip(run(model, x), y):
                loss = loss - frame[label]
            loss.backward()
            for name, p in model.named_parameters():
                total[name] += p.grad**2
        model.zero_grad()
        return {n: v / len(data) for n, v in total.items()}

    def test_fisher_and_penalty_equal_the_naive_sums(self):
        model, data = network().double(), self.data()
        data = [(x.double(), y) for x, y in data]

        def loss(item):
            return torch.nn.functional.nll_loss(
                run(model, item[0]), item[1], reduction="sum"
            )

        method = EWC(strength=3.0, samples=100)
        assert method.penalty(model, None, None, None) is None
        method.consolidate(model, data, loss)
        fisher = self.naive_fisher(model, data)
        for name, value in fisher.items():
            assert torch.allclose(method.fisher[name].double(), value, 1e-5)
        anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        expected = 0.0
        for name, p in model.named_parameters():
            for f, now, then in zip(
                fisher[name].flatten().tolist(),
                p.flatten().tolist(),
                anchor[name].flatten().tolist(),
            ):
                expected += 1.5 * f * (now - then) ** 2
        found = method.penalty(model, None, None, None).item()
        assert found == pytest.approx(expected, rel=1e-5)

    def test_fisher_is_not_the_gradient_of_the_batch_mean(self):
        # Two utterances that pull in opposite directions cancel in a batch.
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        method = EWC()
        method.consolidate(
            model, [1.0, -1.0], lambda s: s * model(torch.ones(1)).sum()
        )
        assert method.fisher["weight"].item() == pytest.approx(1.0)

    def test_parts_get_their_own_modes_back(self):
        # A frozen BatchNorm in a model that trains must stay frozen.
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1)
        ).train()
        model[1].eval()
        seen = []

        def loss(item):
            seen.append([part.training for part in model.modules()])
            return model(item).sum()

        EWC().consolidate(model, [torch.ones(2, 1)], loss)
        assert seen == [[False, False, False]]
        modes = [part.training for part in model.modules()]
        assert modes == [True, True, False]

    def test_older_fisher_decays(self):
        model = torch.nn.Linear(1, 1, bias=False)
        method = EWC(decay=0.5)
        for slope in (2.0, 3.0):
            method.consolidate(
                model, [slope], lambda s: s * model(torch.ones(1)).sum()
            )
        assert method.fisher["weight"].item() == pytest.approx(0.5 * 4 + 9)

    def test_another_size_than_was_measured_is_named(self):
        model, method = torch.nn.Linear(1, 2, bias=False), EWC()
        method.consolidate(
            model, [1.0], lambda s: s * model(torch.ones(1)).sum()
        )
        wider = torch.nn.Linear(1, 3, bias=False)
        with pytest.raises(ValueError, match=r"'weight' .*\(3, 1\).*\(2, 1\)"):
            method.penalty(wider, None, None, None)

    def test_zero_at_the_anchor_and_frozen_ones_count_in_the_fisher(self):
        model, data = network(), self.data()
        PartialUpdate("encoder.*").freeze(model)
        method = EWC()
        method.consolidate(model, data, lambda i: -run(model, i[0])[:, 0].sum())
        assert method.fisher["ctc_lin.weight"].sum() > 0
        assert not model["ctc_lin"].weight.requires_grad
        assert method.penalty(model, None, None, None).item() == 0.0

    def test_cudnn_is_off_for_recurrent_layers(self):
        """It gives them no gradient outside training."""
        seen = []

        def loss(item):
            seen.append((torch.backends.cudnn.enabled, item[0].training))
            return item[0](item[1])[0].sum()

        for model in (torch.nn.LSTM(2, 3), torch.nn.Linear(2, 3)):
            EWC().consolidate(model, [(model, torch.randn(4, 1, 2))], loss)
        assert seen == [(False, False), (True, False)]
        assert torch.backends.cudnn.enabled

    def test_survives_a_checkpoint(self, tmp_path):
        model = network()
        method = EWC(strength=2.0)
        method.consolidate(
            model, self.data(), lambda i: -run(model, i[0])[:, 0].sum()
        )
        method.save(tmp_path / "ewc.ckpt")
        other = EWC(strength=2.0)
        other.load(tmp_path / "ewc.ckpt")
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1
        assert (
            other.penalty(model, None, None, None).item()
            == method.penalty(model, None, None, None).item()
            > 0
        )
        assert other.tasks == 1

    def test_the_penalty_of_half_precision_is_that_of_float32(self):
        # F and (theta - theta*)^2 below float16's least number.
        penalties = []
        for dtype in (torch.float32, torch.float16):
            model = torch.nn.Linear(1, 1, bias=False).to(dtype)
            torch.nn.init.zeros_(model.weight)
            method = EWC(strength=1e12)
            method.fisher = {"weight": torch.full((1, 1), 1e-9)}
            method.anchor = {"weight": model.weight.detach().clone()}
            torch.nn.init.constant_(model.weight, 2.0**-13)
            penalties.append(method.penalty(model, None, None, None).item())
        assert penalties[0] == penalties[1] > 0

    def test_infinite_loss_is_named(self):
        model = torch.nn.Linear(1, 1, bias=False)
        with pytest.raises(ValueError, match="too short"):
            EWC().consolidate(
                model, [math.inf], lambda s: s * model(torch.ones(1)).sum()
            )

    def test_no_utterances(self):
        with pytest.raises(ValueError, match="at least one"):
            EWC().consolidate(network(), [], None)


def test_ewc_of_a_wrapped_model_is_not_of_the_model():
    model, method = torch.nn.Linear(2, 1), EWC()
    wrapped = torch.compile(model, backend="eager")
    method.consolidate(wrapped, [torch.ones(1, 2)], lambda x: model(x).sum())
    assert "_orig_mod.weight" in method.fisher
    with pytest.raises(ValueError, match="'weight' has not.*torch.compile"):
        method.penalty(model, None, None, None)


class TestLwF:
    def test_padding_and_excluded_classes_have_no_gradient(self):
        torch.manual_seed(0)
        scores, old = torch.randn(2, 2, 5, 4)
        scores[..., 3], old[..., 3] = -math.inf, -math.inf
        lens = torch.tensor([1.0, 0.6])
        method = LwF()
        method.teacher = object()
        found = []
        for part in (slice(None), slice(3)):
            new = scores[..., part].log_softmax(-1)
            answer = old[..., part].log_softmax(-1)
            if part.stop is None:
                new[1, 3:], answer[1, 3:] = math.nan, math.nan
            new.requires_grad_()
            loss = method.penalty(None, lambda _, a=answer: a, new, lens)
            loss.backward()
            found.append((loss.detach(), new.grad[..., :3]))
        assert (found[0][1][1, 3:] == 0).all()
        torch.testing.assert_close(found[0], found[1])

    def test_equals_the_naive_divergence_over_valid_frames(self):
        old, model = network(0).double(), network(1).double()
        method = LwF(strength=0.7, temperature=2.0)
        method.before_task(old, 2)
        x = torch.randn(2, 5, 3, dtype=torch.float64)
        lens = torch.tensor([0.6, 1.0])
        found = method.penalty(
            model, lambda net: run(net, x), run(model, x), lens
        )
        total = 0.0
        for utterance, valid in enumerate((3, 5)):
            of_one = 0.0
            for t in range(valid):
                p = run(old, x)[utterance, t].exp() ** 0.5
                q = run(model, x)[utterance, t].exp() ** 0.5
                p, q = (p / p.sum()).tolist(), (q / q.sum()).tolist()
                of_one += sum(a * math.log(a / b) for a, b in zip(p, q))
            total += of_one / valid
        assert found.item() == pytest.approx(0.7 * 4 * total / 2, rel=1e-9)

    def test_padding_may_hold_anything(self):
        old, model = network(0), network(1)
        method = LwF()
        method.before_task(old, 2)
        x = torch.randn(1, 5, 3)
        x[0, 3:] = math.inf
        lens = torch.tensor([0.6])
        log_probs = run(model, x)
        found = method.penalty(model, lambda n: run(n, x), log_probs, lens)
        short = x[:, :3]
        clean = method.penalty(
            model, lambda n: run(n, short), run(model, short), torch.ones(1)
        )
        assert found.item() == pytest.approx(clean.item())

    def test_teacher_is_a_frozen_copy(self):
        model = network()
        method = LwF()
        method.before_task(model, 1)
        x = torch.randn(1, 4, 3)
        assert method.penalty(model, None, run(model, x), None) is None
        method.before_task(model, 2)
        with torch.no_grad():
            model["ctc_lin"].bias[0] += 1.0
        loss = method.penalty(
            model, lambda n: run(n, x), run(model, x), torch.ones(1)
        )
        assert loss.item() > 0
        loss.backward()
        assert model["ctc_lin"].bias.grad.abs().sum() > 0
        assert all(p.grad is None for p in method.teacher.parameters())

    @pytest.mark.parametrize("wrong", [{"strength": -1}, {"temperature": 0}])
    def test_refuses_senseless_settings(self, wrong):
        with pytest.raises(ValueError, match="expected"):
            LwF(**wrong)
