"""F2, F3 and F4: nodes that vanish, and nodes that say so before."""

import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest
import ray
from faulty import SOAK, Story
from services import RayHead, RayNode, ray_node

from raybrats.config import TrainConfig, override_all
from raybrats.runs import launch
from raybrats.runs.run import Result, train
from raybrats.train import checkpoint

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.mlflow,
    pytest.mark.slow,
    pytest.mark.skipif(not SOAK, reason="a node more, for a minute and a half each: make soak"),
]
NOTICE_S = 10
COORDINATOR_S = 25
"""Ray's coordinator looks for new nodes every 20 s; an elastic run starts with those it knows."""
STEPS = 100
SEEN = r'^ray_(raybrats_\w+?)(?:_total)?\{.*run="%s".*\} (\S+)$'
"""A line of Ray's metrics that tells of a run."""


@pytest.fixture
def spread(
    base: TrainConfig, ray_cluster: RayHead, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TrainConfig, RayNode, Story]]:
    """An elastic run with a worker on the head's node and one on another, which has no room for
    both; it goes on until it is told to end."""
    story = Story(tmp_path / "story", step_s=0.15)
    monkeypatch.setattr(launch, "work", story.worker())
    # else Ray tries in vain for a minute to start two workers, as the coordinator remembers them
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    changes = {
        "cluster.min_workers": 1,
        "cluster.cpus_per_worker": 3.0,
        "cluster.max_failures": 1,
        "optim.steps": STEPS,
        "validation.every_steps": STEPS,
        "run.save_every_steps": 1000,
    }
    with ray_node(ray_cluster, tmp_path, num_cpus=3) as node:
        time.sleep(COORDINATOR_S)
        yield override_all(base, changes), node, story


def when(story: Story, step: int, action: Callable[[], object]) -> threading.Thread:
    """Does something once rank 0 has done so many steps."""

    def wait() -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            if (story.folder / "steps").exists() and max(story.steps(), default=0) >= step:
                action()
                return
            time.sleep(0.1)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def outcome(story: Story, result: Result) -> list[tuple[int, int, float]]:
    attempts = story.attempts()
    redone = len(story.steps()) - len(set(story.steps()))
    print(f"attempts {attempts}, {redone} steps done again, restarts {result.restarts}")
    return attempts


def test_a_node_that_vanishes_costs_the_steps_since_the_last_checkpoint(spread):
    """F2: its raylet and workers die at once; the run goes on with the worker that is left."""
    config, node, story = spread
    changes = {"run.name": "vanished", "run.save_every_steps": 10}
    killed, scraped = [], []
    threads = [
        when(story, 25, lambda: (node.kill(), killed.append(time.time()))),
        when(story, STEPS - 20, lambda: scraped.append(metrics("vanished"))),
    ]
    result = train(override_all(config, changes))
    for thread in threads:
        thread.join()
    (first, *_, last) = outcome(story, result)
    print(f"{last[2] - killed[0]:.0f} s from the loss to the next step")
    assert len(killed) == 1, "the node was lost"
    assert (first[0], last[0], result.steps) == (2, 1, STEPS)
    assert last[1] % 10 == 1, "from a checkpoint"
    assert last[1] > 10
    assert result.restarts == 1
    (seen,) = scraped
    assert seen["raybrats_restarts"] == 1


def metrics(run: str) -> dict[str, float]:
    """What those who watch the cluster see of the run, added up over its processes."""
    ports = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    found: dict[str, float] = {}
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for name, value in re.findall(SEEN % run, text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def test_a_notice_makes_a_checkpoint_and_nothing_before_it_is_lost(spread, ray_cluster):
    """F3: `ray drain-node`, then the node is taken away; F4: the other half of it is rank 0's."""
    config, node, story = spread
    drained = []

    def drain() -> None:
        reason = "DRAIN_NODE_REASON_PREEMPTION"
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        command += ["--address", ray_cluster.address, "--node-id", node.node_id]
        command += ["--reason", reason, "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(NOTICE_S)]
        drained.append((max(story.steps()), time.time()))
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(NOTICE_S)
        node.kill()

    scraped = []
    threads = [
        when(story, 20, drain),
        when(story, STEPS - 20, lambda: scraped.append(metrics("noticed"))),
    ]
    changes = {"run.name": "noticed", "cluster.max_failures": 0}
    result = train(override_all(config, changes))
    for thread in threads:
        thread.join()
    (first, *_, last) = outcome(story, result)
    ((noticed, at),) = drained
    print(f"notice at step {noticed}; {last[2] - at:.0f} s later step {last[1]} was done next")
    assert (first[0], last[0], result.steps) == (2, 1, STEPS)
    assert last[1] > noticed, "nothing from before the notice is done again"
    assert checkpoint.newest(result.run_uri).step == STEPS
    (seen,) = scraped
    assert seen["raybrats_cases"] >= seen["raybrats_cache_hits"] > 0
    for name in ("patches_per_s", "step_seconds", "data_wait_fraction", "loss"):
        assert seen[f"raybrats_{name}"] > 0, name
