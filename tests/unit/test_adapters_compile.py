"""A graph that was compiled for one choice is not used for another."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from adapters_toy import ToyEncoder, scramble

from speechbrain_taskarith.adapters import insert_adapters

NAMES = ["a", "b", "c"]


@pytest.fixture
def encoder():
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder = ToyEncoder().eval()
    handle = insert_adapters(encoder, NAMES, bottleneck=4, combination="fusion")
    scramble(handle)
    encoder.requires_grad_(False)
    encoder.x = torch.randn(3, 5, 4)
    encoder.expected = {}
    for choice in (None, "combined", *NAMES):
        with handle.use(choice):
            encoder.expected[choice] = encoder(encoder.x)
    return encoder


def compiled(encoder, **settings):
    return torch.compile(encoder, backend="eager", fullgraph=True, **settings)


def test_every_choice_has_its_own_graph(encoder):
    handle, x, run = encoder.task_adapters, encoder.x, compiled(encoder)
    for _ in range(2):
        for choice in ("a", "b", None, "combined"):
            with handle.use(choice):
                torch.testing.assert_close(run(x), encoder.expected[choice])
            assert torch.equal(run(x), encoder.expected[None])
    handle.use("b")
    torch.testing.assert_close(run(x), encoder.expected["b"])
    with handle.use("a"):
        handle.use("c")
        torch.testing.assert_close(run(x), encoder.expected["c"])
    torch.testing.assert_close(run(x), encoder.expected["b"])


def test_adapters_of_a_model_that_ran_compiled_before():
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder, x = ToyEncoder().eval().requires_grad_(False), torch.randn(3, 5, 4)
    run = compiled(encoder)
    base = run(x)
    for seed in (1, 2):
        torch.manual_seed(seed)
        handle = insert_adapters(encoder, NAMES, bottleneck=4)
        scramble(handle)
        handle.requires_grad_(False)
        handle.use("b")
        assert not torch.allclose(encoder(x), base)
        torch.testing.assert_close(run(x), encoder(x))
        handle.remove()
        torch.testing.assert_close(run(x), base)


def test_utterances_choices_of_one_length_are_told_apart(encoder):
    handle, x, run = encoder.task_adapters, encoder.x, compiled(encoder)
    choices = (["b", "a", "c"], ["a", None, "a"], ["c", "c", "b"])
    for _ in range(2):
        for choice in choices:
            positions = [
                -1 if name is None else NAMES.index(name) for name in choice
            ]
            for given in (choice, torch.tensor(positions)):
                with handle.use(given):
                    got = run(x)
                for row, name in enumerate(choice):
                    torch.testing.assert_close(
                        got[row], encoder.expected[name][row]
                    )


@pytest.mark.parametrize("inside", [True, False])
def test_two_encoders_in_one_graph_keep_their_own_choice(encoder, inside):
    other = pickle.loads(pickle.dumps(encoder))
    twin = copy.deepcopy(encoder)
    names = {m.task_adapters._route.name for m in (encoder, other, twin)}
    assert len(names) == 3
    run = torch.compile(
        lambda x: (encoder(x), other(x)), backend="eager", fullgraph=True
    )
    for one, two in (("a", "b"), ("b", "a"), (None, "a"), ("b", None)):
        first, second = encoder.task_adapters, other.task_adapters
        if not inside:
            first, second, one, two = second, first, two, one
        with first.use(one), second.use(two):
            got = run(encoder.x)
        if not inside:
            one, two = two, one
        torch.testing.assert_close(got[0], encoder.expected[one])
        torch.testing.assert_close(got[1], encoder.expected[two])


def test_threads_keep_their_own_choice_in_a_graph(encoder):
    handle, run, x = encoder.task_adapters, compiled(encoder), encoder.x
    turn, failures = threading.Barrier(3), []

    def work(choice):
        try:
            for _ in range(3):
                if choice is None:  # in no `with`
                    turn.wait()
                    got = run(x)
                else:
                    with handle.use(choice):
                        turn.wait()  # all have chosen
                        got = run(x)
                        turn.wait()
                if choice is None:
                    turn.wait()
                torch.testing.assert_close(got, encoder.expected[choice])
        except BaseException as error:
            failures.append(error)
            turn.abort()

    for choice in ("a", "b", None):  # one graph after the other
        with handle.use(choice):
            run(x)
    threads = [
        threading.Thread(target=work, args=[c]) for c in ("a", "b", None)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_tasks_keep_their_own_choice_in_a_graph(encoder):
    handle, run, x = encoder.task_adapters, compiled(encoder), encoder.x

    async def work(choice):
        for _ in range(3):
            with handle.use(choice):
                await asyncio.sleep(0)
                got = run(x)
            torch.testing.assert_close(got, encoder.expected[choice])

    async def plain():
        for _ in range(3):
            await asyncio.sleep(0)
            assert torch.equal(run(x), encoder.expected[None])

    async def together():
        await asyncio.gather(work("a"), plain(), work("b"), work("combined"))

    asyncio.run(together())


def test_layers_that_are_compiled_apart(encoder):
    handle, x = encoder.task_adapters, encoder.x
    for layer in encoder.layers:
        layer.compile(backend="eager")
    for choice in ("a", "b", None, "combined", "a"):
        with handle.use(choice):
            torch.testing.assert_close(encoder(x), encoder.expected[choice])


def test_more_choices_than_graphs_are_computed_without_one(encoder):
    handle, x = encoder.task_adapters, encoder.x
    run = torch.compile(encoder, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for choice in ("a", "b", None, "combined", "c"):
            with handle.use(choice):
                torch.testing.assert_close(run(x), encoder.expected[choice])
