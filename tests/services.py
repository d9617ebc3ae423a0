"""Real servers on loopback for the tests: S3 (Ceph or moto), PostgreSQL, MLflow and a Ray head.

Each is a context manager that yields once the server answers and leaves no process behind. Ports
are chosen at run time, so sessions can run side by side. Logs lie in the (existing) folder given.
"""

import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import mock

import boto3

START_S = 120  # deadline of every start; measured on two cores: Ceph 1 s, MLflow 5 s, Ray 8 s
FALLBACKS = "RAYBRATS_FALLBACKS" in os.environ
"""Whether what Debian has is left alone, as on a machine where none of it is installed."""
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=None)


def free_ports(count: int) -> range:
    """Consecutive ports, free on every interface, below the range of client sockets."""
    for first in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with suppress(OSError), ExitStack() as probes:
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("", port))
            return range(first, first + count)
    raise OSError(f"no {count} consecutive free ports between 20000 and 32000")


def http_status(port: int, path: str = "/", headers: Mapping[str, str] | None = None) -> int | None:
    """Status of a GET on 127.0.0.1, or None when nothing answers; never goes through a proxy."""
    with suppress(OSError, HTTPException):
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers={"Connection": "close", **(headers or {})})
        return connection.getresponse().status
    return None


@contextmanager
def running(
    command: list[Any],
    log: Path,
    ready: Callable[[], bool] = lambda: True,
    stop: signal.Signals = signal.SIGTERM,
    patience_s: float = 10,
    **popen: Any,
) -> Iterator[int]:
    """A process that leads a session, up once it is `ready`; the whole session ends at exit.

    Yields its pid, which is also the number of the session.
    """
    popen |= {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    with log.open("ab") as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, **popen)
    try:
        deadline = time.monotonic() + START_S
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"not up, exit code {process.poll()}; end of {log}:\n{tail}")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.send_signal(stop)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        kill_session(process.pid)
        process.wait()


def kill_session(session: int) -> None:
    """SIGKILL to every process of a session: Ray's workers leave the process group, not this."""
    for pid in processes(session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes(session: int, title: str = "") -> list[int]:
    """The processes of a session whose command line begins so."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            own = int(stat.read_text().rpartition(")")[2].split()[3]) == session
            if own and stat.with_name("cmdline").read_bytes().startswith(title.encode()):
                found.append(int(stat.parent.name))
    return found


@dataclass(frozen=True)
class S3:
    """An S3 server and the one user it knows; only Ceph checks signatures."""

    endpoint: str
    access_key: str
    secret_key: str
    kind: Literal["ceph", "moto"]

    def environment(self) -> dict[str, str]:
        """What boto3, s3fs, pyarrow and MLflow need to reach this server and no other."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A boto3 client, whatever the environment says."""
        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)


def make_bucket(s3: S3, name: str) -> str:
    """Creates a bucket and returns its name."""
    s3.client().create_bucket(Bucket=name)
    return name


def upload_folder(s3: S3, folder: Path, bucket: str, prefix: str) -> str:
    """Uploads every file below a folder; returns the URI of the copy."""
    client = s3.client()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(file), bucket, f"{prefix}/{file.relative_to(folder).as_posix()}")
    return f"s3://{bucket}/{prefix}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """Ceph's S3 gateway where it is installed and we are root, else moto's server."""
    installed = all(map(shutil.which, ("radosgw", "ceph-mon", "ceph-osd")))
    if os.geteuid() == 0 and installed and not FALLBACKS:
        with _ceph(folder.resolve()) as s3:
            yield s3
        return
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    with running(command, folder / "moto.log", lambda: http_status(port) is not None):
        # moto takes any credentials; random ones are found nowhere by chance
        yield S3(f"http://127.0.0.1:{port}", "test", secrets.token_hex(20), "moto")


CEPH_CONF = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{ports[1]}]
public addr = 127.0.0.1
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
log file = {folder}/$name.log
pid file =
admin socket =
osd pool default size = 1
osd pool default pg num = 4
mon allow pool size one = true
mon data avail crit = 1
paxos propose interval = 0.01
osd objectstore = memstore
memstore device bytes = 4294967296
ms bind msgr1 = false
ms bind port min = {ports[2]}
ms bind port max = {ports[31]}
rgw frontends = beast endpoint=127.0.0.1:{ports[0]} tcp_nodelay=1
"""


@contextmanager
def _ceph(folder: Path) -> Iterator[S3]:
    """One monitor, one OSD that keeps its objects in memory, one gateway.

    Authentication is on: without it radosgw hangs. No daemon opens an admin socket, whose path
    could exceed the 107 characters of a unix socket.
    """
    ports, conf, keyring = free_ports(32), folder / "ceph.conf", folder / "keyring"
    fsid, secret = uuid.uuid4(), secrets.token_hex()
    conf.write_text(CEPH_CONF.format(fsid=fsid, folder=folder, ports=ports))
    keyring.touch(mode=0o600)
    (folder / "osd").mkdir()

    def run(*command: Any) -> None:
        line = [*map(str, command), "-c", str(conf)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise RuntimeError(f"{line}: exit code {done.returncode}: {done.stderr[-2000:]}")

    def daemon(command: str, *options: str, **how: Any) -> None:
        line, log = [command, "-c", conf, *options, "-f"], folder / f"{command}.out"
        servers.enter_context(running(line, log, **how))

    for name in ("mon.", "client.admin", "osd.0"):
        caps = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        run("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
    where, monmap = f"[v2:127.0.0.1:{ports[1]}]", folder / "monmap"
    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", where, monmap)
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    with ExitStack() as servers:  # ends the gateway first, the monitor last
        daemon("ceph-mon", "-i", "a")
        run("ceph", "osd", "create")
        run("ceph-osd", "-i", "0", "--mkfs")
        daemon("ceph-osd", "-i", "0", patience_s=3)  # can hang on SIGTERM
        daemon("radosgw", "-n", "client.admin", ready=lambda: http_status(ports[0]) is not None)
        user = ("--uid=test", "--display-name=test", "--access-key=test", f"--secret={secret}")
        run("radosgw-admin", "user", "create", *user)
        yield S3(f"http://127.0.0.1:{ports[0]}", "test", secret, "ceph")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server; yields the URI of a database of its user `mlflow`."""
    (port,), binaries = free_ports(1), POSTGRES.parent
    # data in /tmp: the server refuses root, and its user cannot enter pytest's folders (mode 0700)
    with TemporaryDirectory(prefix="rbpg", dir="/tmp") as data:
        popen: dict[str, Any] = {"cwd": data}
        if os.geteuid() == 0:
            shutil.chown(data, "postgres", "postgres")
            popen |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        with (folder / "initdb.log").open("wb") as log:
            command = [binaries / "initdb", "-U", "mlflow", "-A", "trust", "-E", "UTF8", "-N", data]
            subprocess.run(command, stdout=log, stderr=log, check=True, **popen)
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-F"]
        command = [binaries / "postgres", "-D", data, "-p", port, *settings]
        probe = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        ready = lambda: subprocess.run(probe).returncode == 0  # noqa: E731
        # SIGINT: the "fast" shutdown, which does not wait for clients
        with running(command, folder / "postgres.log", ready, signal.SIGINT, **popen):
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"


@contextmanager
def mlflow_server(folder: Path, s3: S3, bucket: str) -> Iterator[str]:
    """An MLflow server that keeps artifacts in S3 and the rest in PostgreSQL, else SQLite."""
    (port,) = free_ports(1)
    offline = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = {**os.environ, **s3.environment(), **offline}
    with ExitStack() as servers:
        store = f"sqlite:///{folder.resolve()}/mlflow.db"
        if POSTGRES and not FALLBACKS and find_spec("psycopg"):
            store = servers.enter_context(postgres(folder))
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
        command += ["--allowed-hosts", "127.0.0.1:*", "--workers", "1"]
        command += ["--backend-store-uri", store, f"--artifacts-destination=s3://{bucket}/mlflow"]
        ready = lambda: http_status(port, "/health") == 200  # noqa: E731
        servers.enter_context(running(command, folder / "mlflow.log", ready, env=environment))
        yield f"http://127.0.0.1:{port}"


@dataclass(frozen=True)
class RayHead:
    """A Ray head with token authentication."""

    address: str  # host:port, for ray.init
    api_url: str  # http://host:port, of the dashboard and the jobs
    environment: dict[str, str]  # what a client process must set before it connects
    of_workers: dict[str, str]  # what its workers and jobs find besides
    session: int = 0  # of all its processes

    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended: SUCCEEDED, FAILED or STOPPED; its logs are stdout and stderr, merged."""

    status: str
    exit_code: int | None
    logs: str


@contextmanager
def ray_head(
    folder: Path, environment: Mapping[str, str], num_cpus: int = 4, object_store_mb: int = 512
) -> Iterator[RayHead]:
    """A Ray head whose workers and jobs inherit `environment`; up once it has run a job."""
    (token := folder.resolve() / "ray_token").touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, agent, agent_grpc, client = free_ports(5)
    address, api_url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
    client_side = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    client_side |= {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": api_url}
    head = RayHead(address, api_url, client_side, dict(environment))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's `python` is this one
    variables = {**os.environ, "PATH": path, **environment, **head.environment}
    # unix sockets lie below the temporary folder: its path must be short; worker port 0: any
    with TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        options = f"""--head --block --disable-usage-stats --temp-dir={temporary} --port={gcs}
            --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --num-cpus={num_cpus}
            --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc}
            --include-log-monitor=false
            --ray-client-server-port={client} --min-worker-port=0 --max-worker-port=0
            --object-store-memory={object_store_mb * 2**20}"""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()]
        try:
            log = folder / "ray.log"
            with running(command, log, lambda: _runs_jobs(head), env=variables) as session:
                yield replace(head, session=session)
        finally:
            with suppress(OSError):
                shutil.copytree(f"{temporary}/session_latest/logs", folder / "ray_logs")


def _runs_jobs(head: RayHead) -> bool:
    with suppress(Exception):  # the agent that runs jobs starts after the API that takes them
        return run_job(head, "true", None, 30).status == "SUCCEEDED"
    return False


def run_job(
    head: RayHead, entrypoint: str, working_dir: Path | None, timeout_s: float, **env_vars: str
) -> JobOutcome:
    """Submits a job and waits for its end; stops it and raises TimeoutError after `timeout_s`."""
    from ray.job_submission import JobSubmissionClient

    with mock.patch.dict(os.environ, head.environment):  # it overrides the client's argument
        headers = {"Authorization": f"Bearer {head.token()}"}
        client = JobSubmissionClient(head.api_url, headers=headers)
    folder = {"working_dir": str(working_dir)} if working_dir else {}
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": env_vars, **folder})
    deadline = time.monotonic() + timeout_s
    while not (info := client.get_job_info(job)).status.is_terminal():
        if time.monotonic() > deadline:
            tail = client.get_job_logs(job)[-3000:]
            client.stop_job(job)
            raise TimeoutError(f"{entrypoint}: {info.status} after {timeout_s} s; logs:\n{tail}")
        time.sleep(1)  # each question costs the head tens of milliseconds
    return JobOutcome(info.status.value, info.driver_exit_code, client.get_job_logs(job))


def json_document(logs: str) -> dict[str, Any]:
    """The last complete JSON object that starts a line; ValueError when there is none."""
    found, end = None, 0
    for start in re.finditer(r"^\{", logs, re.MULTILINE):
        if start.start() >= end:
            with suppress(json.JSONDecodeError):
                found, end = json.JSONDecoder().raw_decode(logs, start.start())
    if found is None:
        raise ValueError(f"no JSON document in the logs:\n{logs[-3000:]}")
    return found


@dataclass(frozen=True)
class RayNode:
    """A node beside the head's, on this machine: a raylet and its workers."""

    node_id: str
    session: int

    def kill(self) -> None:
        """Ends it as a machine ends that loses its power: at once, with all its processes."""
        kill_session(self.session)


@contextmanager
def ray_node(head: RayHead, folder: Path, num_cpus: int) -> Iterator[RayNode]:
    """Joins a node to the head's cluster; this process is connected to it."""
    import ray

    before = {node["NodeID"] for node in ray.nodes()}
    agent, agent_grpc = free_ports(2)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, **head.of_workers, **head.environment}
    options = f"""--block --address={head.address} --num-cpus={num_cpus} --disable-usage-stats
        --dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc}
        --min-worker-port=0 --max-worker-port=0 --object-store-memory={150 * 2**20}"""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()]

    def joined() -> list[str]:
        return [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in before]

    log = folder / "ray_node.log"
    with running(command, log, lambda: bool(joined()), env=variables) as session:
        yield RayNode(joined()[0], session)
