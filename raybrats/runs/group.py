"""The process group of a run: the network over which its ranks speak, and its end."""

import os

import psutil
import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

END_S = "5"
"""Seconds that ranks have to leave each other, before their processes end anyway. One that hangs in
a collective never does; Ray waits for 30 s, at every restart."""
INTERFACE = "GLOO_SOCKET_IFNAME"


class Group(TorchConfig):
    """torch's process group, over the network of Ray's nodes."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What makes and ends it."""
        return _Backend


class _Backend(_TorchBackend):
    """Runs in Ray Train's controller."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        """Chooses each worker's interface, and makes the group."""
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """Ends the group."""
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, END_S)
        super().on_shutdown(worker_group, backend_config)


def choose_interface() -> None:
    """Has gloo use the interface of this node's address in Ray, unless the user has said which.

    By itself it takes that of the host's name, which on many machines is the loopback.

    Example:
        >>> choose_interface()  # doctest: +SKIP
    """
    found = interface_of(ray.util.get_node_ip_address())
    if found:
        os.environ.setdefault(INTERFACE, found)


def interface_of(address: str) -> str:
    """The network interface that has an IP address; empty where none has.

    Example:
        >>> interface_of("127.0.0.1")
        'lo'
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return ""
