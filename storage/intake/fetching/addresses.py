"""Which addresses may be connected to: public ones, and those that the settings allow by name.

A name is resolved once, its addresses are looked at, and the connection goes to the very address that was looked at:
a name server that answers otherwise the second time gains nothing. Spellings (hexadecimal, a single number, a name of
loopback) do not matter either, since what is judged is the address and not its text.
"""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.intake.fetching.errors import NO_ANSWER, FetchError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PORTS = (80, 443)
"""Allowed below 1024: a web server is there, and other services are not to be spoken to."""

_NOT_PUBLIC = (
    # Azure answers every virtual machine there with its own metadata.
    ipaddress.ip_network("168.63.129.16/32"),
    # For protocols, and Oracle's metadata; some versions of Python take most of it for public.
    ipaddress.ip_network("192.0.0.0/24"),
)
"""Beside what the standard library knows."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
MOST_TRIED = 2
"""Addresses of one name that are connected to in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AddressRules:
    """Where requests may go."""

    allowed: tuple[Network, ...] = field(default=())
    """Networks that are reached although they are not public."""

    def refusal(self, address: Address) -> str | None:
        """Why an address must not be reached, in words; None when it may be."""
        meant = _meant(address)
        if any(
            each.version == network.version and each in network
            for each in {address, meant}
            for network in self.allowed
        ):
            return None
        if any(meant.version == n.version and meant in n for n in _NOT_PUBLIC):
            return f"{meant} is kept for protocols and clouds' metadata"
        if meant.is_loopback:
            return f"{meant} is this machine"
        if meant.is_link_local:
            return f"{meant} is link-local, where clouds keep their metadata"
        if meant.is_multicast:
            return f"{meant} is a multicast address"
        if not meant.is_global:
            return f"{meant} is not a public address"
        return None

    def check_port(self, port: int) -> None:
        """Raises FetchError for a port at which no web server listens."""
        if port < 1024 and port not in PORTS and not self.allowed:
            raise FetchError("blocked_address", f"port {port} is not one of the web")

    def check_literal(self, host: str) -> None:
        """Raises FetchError when a host is spelt as a number that must not be reached; names pass.

        For requests that a proxy resolves: the numbers are all that can be judged here.
        """
        try:
            address: Address = ipaddress.ip_address(socket.inet_aton(host))
        except (OSError, ValueError):
            try:
                address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
            except ValueError:
                name = host.rstrip(".").lower()
                if name == "localhost" or name.endswith(".localhost"):
                    address = ipaddress.ip_address("127.0.0.1")
                else:
                    return
        refused = self.refusal(address)
        if refused is not None:
            raise FetchError("blocked_address", refused)

    def connect(
        self, target: tuple[str, int], timeout: Any = None, source: Any = None
    ) -> socket.socket:
        """A connection to a host that resolves to an allowed address; in place of socket.create_connection.

        Raises FetchError: `dns` when the name has no address, `blocked_address` when none of them may be reached.
        OSError of the last address otherwise.
        """
        host, port = target
        self.check_port(port)
        allowed = self._resolved(host, port)
        last: OSError | None = None
        for family, kind, protocol, where in allowed[:MOST_TRIED]:
            connection = socket.socket(family, kind, protocol)
            try:
                if isinstance(timeout, int | float):
                    connection.settimeout(timeout)
                connection.connect(where)
            except OSError as err:
                connection.close()
                last = err
            else:
                return connection
        assert last is not None
        raise last

    def _resolved(self, host: str, port: int) -> list[tuple[Any, Any, int, Any]]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as err:
            why = NO_ANSWER if err.errno == socket.EAI_AGAIN else err.strerror
            raise FetchError("dns", f"{host}: {why}") from err
        except UnicodeError as err:
            raise FetchError("dns", f"{host[:80]!r} is no name: {err}") from err
        refused = []
        allowed = []
        for family, kind, protocol, _, where in found:
            why = self.refusal(ipaddress.ip_address(str(where[0]).partition("%")[0]))
            if why is None:
                allowed.append((family, kind, protocol, where))
            else:
                refused.append(why)
        if not allowed:
            raise FetchError("blocked_address", f"{host}: {refused[0]}")
        return allowed


def address_rules(allowed: Sequence[str]) -> AddressRules:
    """Rules that let some networks be reached, each as `10.0.0.0/8` or one address. ValueError names a bad one."""
    return AddressRules(allowed=tuple(ipaddress.ip_network(each) for each in allowed))


def _meant(address: Address) -> Address:
    """The IPv4 address that an IPv6 one carries, where it does."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address.teredo is not None:
            return address.teredo[1]
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
