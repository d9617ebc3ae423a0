"""Ranks of several nodes meet over the interface that Ray's nodes have."""

import pytest
import ray

from raybrats.runs import group
from raybrats.runs.group import INTERFACE, choose_interface, interface_of


def test_an_interface_is_found_by_its_address(monkeypatch):
    told = {
        "lo": ["127.0.0.1", "::1"],
        "eth0": ["10.0.0.7", "fe80::1%eth0", "02:42:0a:00:00:07"],
    }
    addresses = {n: [type("A", (), {"address": a}) for a in many] for n, many in told.items()}
    monkeypatch.setattr(group.psutil, "net_if_addrs", lambda: addresses)
    asked = ["10.0.0.7", "::1", "fe80::1", "10.0.0.70", ""]
    assert [interface_of(address) for address in asked] == ["eth0", "lo", "eth0", "", ""]


@pytest.mark.parametrize(
    ("address", "users", "chosen"),
    [("127.0.0.1", None, "lo"), ("127.0.0.1", "eth9", "eth9"), ("192.0.2.1", None, None)],
)
def test_it_is_that_of_the_node_unless_the_user_says_another(monkeypatch, address, users, chosen):
    monkeypatch.setenv(INTERFACE, users or "") if users else monkeypatch.delenv(INTERFACE, False)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    choose_interface()
    assert group.os.environ.get(INTERFACE) == chosen
    monkeypatch.delenv(INTERFACE, False)
