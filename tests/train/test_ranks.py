"""Several ranks learn what one would: without Ray, in processes of their own."""

import json

import pytest
import torch
import torch.distributed
from faulty import SOAK
from ranks import CASES, CONFIG, CPU, batches, losses, steps, together, train_rank, weights
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend

from raybrats.config import override, override_all
from raybrats.model.inference import uploaded
from raybrats.train import loop
from raybrats.train.learner import new_learner
from raybrats.train.ranks import choose_kernels, make_ready
from raybrats.train.step import train_step

SELDOM = pytest.mark.skipif(not SOAK, reason="two processes more: make soak")


@pytest.mark.parametrize(
    ("world", "batch", "changes"),
    [
        pytest.param(2, 2, {}, marks=SELDOM),
        (2, 2, {"loss.batch_dice": True}),
        (3, 4, {"loss.batch_dice": True, "loss.focal_weight": 0.5}),
        pytest.param(2, 4, {"optim.micro_batch": 1}, marks=SELDOM),
        pytest.param(3, 5, {"optim.micro_batch": 1}, marks=SELDOM),
    ],
    ids=["each", "batch-dice", "uneven", "micro", "micro-uneven"],
)
def test_several_workers_take_the_step_of_one(tmp_path, world, batch, changes):
    length = {"optim.global_batch": batch, "optim.steps": 3, "cluster.min_workers": 1}
    config = override_all(CONFIG, {**changes, **length, "cluster.workers": world})
    config = override_all(config, {"validation.every_steps": 3, "optim.name": "sgd"})
    assert together(world, train_rank, tmp_path, config) == [0] * world
    learner, expected = steps(override(config, "optim.micro_batch", 0), 3)
    assert list(losses(tmp_path).values()) == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, learner.weights()[name], rtol=1e-4, atol=1e-5)


def test_a_dice_over_the_batch_with_micro_batches_is_the_same_on_all_ranks(tmp_path):
    changes = {"loss.batch_dice": True, "optim.micro_batch": 1, "optim.global_batch": 5}
    config = override_all(CONFIG, {**changes, "optim.steps": 3, "cluster.min_workers": 1})
    assert together(3, train_rank, tmp_path, config) == [0, 0, 0], "a rank without a patch hangs"
    assert weights(tmp_path)


def test_workers_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match=r"multiple of cluster\.workers"):
        override_all(CONFIG, {"cluster.workers": 3, "optim.global_batch": 4})


def compiled_rank(rank, world, cases, folder, config, broken):
    """Two steps of a compiled network, a validation, a step: graphs after each, and the losses.

    The compiler of the rank `broken` fails.
    """
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    graphs, compiler = [], torch.compile

    def backend(graph, examples):
        if rank == broken:
            raise RuntimeError("no compiler here")
        graphs.append(graph)
        return aot_eager(graph, examples)

    torch.compile = lambda network, **settings: compiler(network, backend=backend, **settings)
    learner = new_learner(config, CPU)
    make_ready(learner)
    given, counts, found = batches(config, cases, (rank, world, 0)), [len(graphs)], []
    for validates in (False, True, False):
        found.append(float(train_step(learner, next(given))))
        if validates:
            loop.validate(learner, [uploaded(cases[0], CPU)])
        counts.append(len(graphs))
    result = {"graphs": counts, "losses": found, "said": learner.not_compiled}
    (folder / f"{rank}.json").write_text(json.dumps(result))


@pytest.mark.parametrize("broken", [None, 1])
def test_ranks_compile_what_lies_between_ddps_buckets_or_none_of_them_does(tmp_path, broken):
    changes = {"network.widths": (8, 16, 32, 64), "optim.global_batch": 2, "optim.micro_batch": 1}
    config = override_all(CONFIG, {**changes, "cluster.workers": 2, "cluster.compile": True})
    assert together(2, compiled_rank, tmp_path, config, broken) == [0, 0]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    whole = steps(override(config, "cluster.compile", False), 3)[1]
    total = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert total == pytest.approx(whole, rel=1e-4)
    if broken is None:
        assert ranks[0]["graphs"] == ranks[1]["graphs"]
        first, *later = ranks[0]["graphs"]
        assert first > 1, "1.4 MB of weights are two buckets: DDP's first one is of 1 MB"
        assert later == [first] * 3
        assert not any(rank["said"] for rank in ranks)
    else:
        assert all("no compiler here" in rank["said"] for rank in ranks)
        assert ranks[1]["graphs"] == [0] * 4


@pytest.mark.parametrize(
    ("changes", "searches", "steady"),
    [
        ({}, True, False),
        ({"data.sampling": "volume"}, False, False),
        ({"cluster.deterministic": True}, False, True),
    ],
)
def test_kernels_are_the_fastest_for_one_size_or_those_of_the_same_bits(changes, searches, steady):
    try:
        choose_kernels(override_all(CONFIG, changes))
        assert torch.backends.cudnn.benchmark == searches
        assert torch.are_deterministic_algorithms_enabled() == steady
    finally:
        choose_kernels(CONFIG)
        torch.backends.cudnn.benchmark = False


def test_a_compiled_network_is_one_graph_and_none_is_new_after_a_validation(monkeypatch):
    counter, compiler = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *of, **how: compiler(*of, backend=counter, **how))
    torch.compiler.reset()
    learner = new_learner(override(CONFIG, "cluster.compile", True), CPU)
    make_ready(learner)
    assert not learner.not_compiled
    given, case = batches(CONFIG, CASES, (0, 1, 0)), uploaded(CASES[0], CPU)
    for _ in range(2):
        train_step(learner, next(given))
        loop.validate(learner, [case])
        train_step(learner, next(given))
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    assert any("batch_norm" in str(node.target) for node in graph.graph.nodes)
