"""No request reaches an address that is not public, however it is spelt, named or redirected to."""

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.intake.fetching.addresses import AddressRules, address_rules
from storage.intake.fetching.errors import NO_ANSWER, FetchError

PUBLIC = AddressRules()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.10",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::7f00:1",
        "2001:0:102:304::80ff:fffe",
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert PUBLIC.refusal(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses_pass(address: str) -> None:
    assert PUBLIC.refusal(ipaddress.ip_address(address)) is None


@given(st.ip_addresses(v=4))
def test_an_address_carried_in_another_is_judged_as_itself(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    carried = [
        ipaddress.IPv6Address((0xFFFF << 32) | number),
        ipaddress.IPv6Address((0x2002 << 112) | (number << 80)),
        ipaddress.IPv6Address((0x64FF9B << 96) | number),
    ]
    refused = PUBLIC.refusal(address) is not None
    assert [PUBLIC.refusal(each) is not None for each in carried] == [refused] * 3


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST.",
        "a.localhost",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0x7f.1",
        "[::1]",
        "::ffff:127.0.0.1",
        "169.254.169.254",
        "0251.0376.0251.0376",
        "fe80::1%eth0",
    ],
)
def test_numbers_are_refused_in_any_spelling(host: str) -> None:
    with pytest.raises(FetchError, match=r"^blocked_address: "):
        PUBLIC.check_literal(host)


@pytest.mark.parametrize("host", ["example.com", "1.1.1.1", "127.0.0.1.example.com", "beef.test"])
def test_names_and_public_numbers_are_left_to_the_resolver(host: str) -> None:
    PUBLIC.check_literal(host)


@pytest.mark.parametrize("spelling", ["127.0.0.1", "2130706433", "0x7f.1", "localhost"])
def test_no_connection_is_made_to_this_machine(spelling: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        with pytest.raises(FetchError, match=r"^blocked_address: .*this machine"):
            PUBLIC.connect((spelling, port), 1.0)
        with pytest.raises(TimeoutError):
            server.accept()
        address_rules(["127.0.0.0/8"]).connect((spelling, port), 1.0).close()
        server.accept()[0].close()


def test_the_address_that_was_looked_at_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name server that says something harmless first and this machine afterwards."""
    asked = []

    def resolve(host: str, port: int, **given: Any) -> list[Any]:
        asked.append(host)
        address = "203.0.113.7" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    # 203.0.113.0/24 is for documentation; nobody answers there.
    rules = address_rules(["203.0.113.0/24"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        with pytest.raises(OSError, match=r"timed out|unreachable|refused|No route"):
            rules.connect(("rebinding.test", server.getsockname()[1]), 0.3)
        with pytest.raises(TimeoutError):
            server.accept()
    assert asked == ["rebinding.test"]


def test_of_several_addresses_only_the_allowed_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in ("10.0.0.1", "127.0.0.1")
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
        address_rules(["127.0.0.1/32"]).connect(("two.test", port), 1.0).close()


def test_name_without_an_address_is_dns(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(*a: Any, **k: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_answer)
    with pytest.raises(FetchError, match=f"^dns: a.test: {NO_ANSWER}"):
        PUBLIC.connect(("a.test", 80), 1.0)


@pytest.mark.parametrize("port", [22, 25, 110, 143, 587])
def test_ports_of_other_services_are_refused(port: int) -> None:
    with pytest.raises(FetchError, match=f"^blocked_address: port {port}"):
        PUBLIC.connect(("1.1.1.1", port), 0.1)
