"""F18, F25 and F26: everything at once, lost messages, too little memory for what is streamed."""

import json
import os
import random
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from fault_proxy import line_to
from faulty import SOAK, STEPS, Story
from mlflow import MlflowClient
from services import processes, ray_head, run_job

from raybrats import storage
from raybrats.config import override_all
from raybrats.errors import StorageError
from raybrats.phantom.phantom import write_phantoms
from raybrats.runs import launch
from raybrats.runs.run import train
from raybrats.train import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.mlflow]
SECONDS, EVERY_S, LENGTH = 300, 15, 400
"""How long faults come, how often, and steps for as long, with the restarts that they cost."""
STEP_S = 0.4
KILLED, DAMAGED = "a worker was killed", "the newest checkpoint was damaged"
AWAY = "MLflow was away"


class Chaos:
    """One fault after the other, drawn at random, while a run goes on."""

    def __init__(self, run_uri, line, story, session):
        seed = int.from_bytes(os.urandom(2))
        print(f"seed {seed}")
        self.happened, self._dice, self._session = [], random.Random(seed), session
        self._damaged = set()
        self._run_uri, self._line, self._story = run_uri, line, story
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def end(self):
        self._ended.set()
        self._thread.join()
        self._line.become("up")

    def _go_on(self):
        kinds = [self.kill_a_worker, self.damage_the_newest, self.cut_mlflow]
        while not (self._story.folder / "steps").exists() and not self._ended.wait(0.5):
            continue
        until, coming = time.monotonic() + SECONDS, []
        while not self._ended.wait(EVERY_S) and time.monotonic() < until:
            coming = coming or self._dice.sample(kinds, len(kinds))
            coming.pop()()

    def kill_a_worker(self):
        found = processes(self._session, "ray::RayTrainWorker")
        with suppress(ProcessLookupError, IndexError):  # a restart is under way
            os.kill(self._dice.choice(found), signal.SIGKILL)
            self.happened.append(KILLED)

    def damage_the_newest(self):
        """Once an older one is sound: one that was damaged before may lie there still."""
        written = []
        while all(one.uri in self._damaged for one in written[:-1]):
            if self._ended.wait(0.2):
                return
            written = checkpoint.written(self._run_uri)
        with suppress(StorageError):  # it may be pruned this very moment
            place = storage.join(written[-1].uri, checkpoint.STATE)
            storage.write_bytes(place, storage.read_bytes(place)[:-7])
            self._damaged.add(written[-1].uri)
            self.happened.append(DAMAGED)
            self.kill_a_worker()

    def cut_mlflow(self):
        self._line.become("cut")
        self._ended.wait(EVERY_S / 2)
        self._line.become("up")
        self.happened.append(AWAY)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not SOAK, reason="five minutes of each fault that others test: make soak")
def test_a_run_in_chaos_ends_and_its_history_is_whole(base, ray_cluster, tmp_path, monkeypatch):
    """F26."""
    story = Story(tmp_path / "story", step_s=STEP_S)
    monkeypatch.setattr(launch, "work", story.worker())
    steps = LENGTH
    with line_to(base.tracking.uri) as line:
        changes = {
            "run.name": "chaos",
            "tracking.uri": line.uri,
            "cluster.max_failures": 100,
            "optim.steps": steps,
            "run.save_every_steps": 5,
            "validation.every_steps": steps,
        }
        config = override_all(base, changes)
        run_uri = storage.join(base.run.storage_uri, "chaos")
        chaos = Chaos(run_uri, line, story, ray_cluster.session)
        try:
            result = train(config)
        finally:
            chaos.end()
    print(f"{chaos.happened}; {result.restarts} restarts")
    assert {KILLED, DAMAGED, AWAY} <= set(chaos.happened)
    assert result.restarts > 0
    done, attempts = story.steps(), [first for _, first, _ in story.attempts()]
    assert set(done) == set(range(1, steps + 1)), "no step was left out"
    assert all(after in (before + 1, *attempts) for before, after in pairwise(done))
    found = checkpoint.newest(run_uri)
    assert found.finished
    assert all(torch.isfinite(tensor).all() for tensor in found.weights.values())
    client = MlflowClient(base.tracking.uri)
    history = client.get_metric_history(result.mlflow_run_id, "train/loss")
    assert [m.step for m in history] == list(range(10, steps + 1, 10)), "each once"


SCRIPT = """
import json, sys
from raybrats.config import from_json
from raybrats.runs.run import train
result = train(from_json(open(sys.argv[1]).read()))
print(json.dumps({"steps": result.steps, "restarts": result.restarts}))
"""


def alone(config, folder, environment, num_cpus=4, store_mb=512):
    """The run on a Ray cluster of its own with these variables, as a job of it."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "train.py").write_text(SCRIPT)
    with ray_head(folder, environment, num_cpus, store_mb) as head:
        outcome = run_job(head, f"python {folder}/train.py {folder}/config.json", None, 400)
    assert outcome.status == "SUCCEEDED", outcome.logs[-3000:]
    return json.loads(outcome.logs.strip().splitlines()[-1])


@pytest.fixture
def cluster_of_its_own(base, ray_cluster, tmp_path):
    """A configuration, and what the processes of another cluster find in their environment."""

    def made(**changes):
        return asdict(
            override_all(base, {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db", **changes})
        )

    return made, dict(ray_cluster.of_workers)


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="a cluster of its own: make soak")
def test_messages_that_are_lost_are_sent_again(cluster_of_its_own, tmp_path):
    """F25: requests and answers of the cluster's services vanish on their way."""
    made, environment = cluster_of_its_own
    often = {"num_failures": 30, "req_failure_prob": 15, "resp_failure_prob": 15}
    methods = (
        "ray::rpc::NodeManagerService.grpc_client.RequestWorkerLease",
        "ray::rpc::NodeManagerService.grpc_client.ReturnWorkerLease",
        "ray::rpc::InternalKVGcsService.grpc_client.InternalKVGet",
        "ray::rpc::InternalKVGcsService.grpc_client.InternalKVPut",
        "ray::rpc::ActorInfoGcsService.grpc_client.GetActorInfo",
    )
    environment["RAY_testing_rpc_failure"] = json.dumps(dict.fromkeys(methods, often))
    found = alone(made(**{"run.name": "lossy"}), tmp_path, environment)
    assert found == {"steps": STEPS, "restarts": 0}


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="a cluster of its own: make soak")
def test_a_small_object_store_slows_a_run_down_and_no_more(cluster_of_its_own, tmp_path):
    """F18: 80 MB for patches of 64^3, of which a window of eight batches alone takes 38 MB."""
    made, environment = cluster_of_its_own
    write_phantoms(str(tmp_path / "tree"), num_cases=6, shape=(128, 128, 96))
    changes = {
        "run.name": "narrow",
        "data.cohort": str(tmp_path / "tree"),
        "data.patch_size": (64, 64, 64),
        "data.patches_per_case": 4,
        "data.prefetch_batches": 8,
    }
    assert alone(made(**changes), tmp_path, environment, store_mb=80) == {
        "steps": 14,
        "restarts": 0,
    }
