"""Addresses compared: two spellings of one web address have one normal form, and a host has its subdomains.

`HTTP://Example.com:80/a b.jpg#top` and `http://example.com/a%20b.jpg` are one address; http and https of a host are
taken for the same place.
"""

import re
import urllib.parse

import idna

from storage.errors import ConfigError

_DEFAULT_PORTS = {"http": 80, "https": 443}
_SAFE = "%/:=&?~#+!$,;'@()*[]"
"""What stays as it is in an address that is made fit for HTTP."""
_ESCAPE = re.compile(r"%[0-9a-fA-F]{2}")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")


def fit_for_http(url: str) -> str:
    """An address with spaces and other scripts percent-encoded, as it is asked for."""
    return urllib.parse.quote(url.strip(), safe=_SAFE)


def normal(url: str | None) -> str | None:
    """The normal form of a web address, `host[:port]/path[?query]`; None for what is no http or https address.

    Scheme, user, default port and fragment are left out; the host is in lower case and ASCII (IDNA), escapes are in upper
    case.
    """
    parts = _parts(url)
    host = host_of(url)
    if parts is None or host is None:
        return None
    try:
        port = parts.port
    except ValueError:
        return None
    shown = "" if port in (None, _DEFAULT_PORTS[parts.scheme.lower()]) else f":{port}"
    path = fit_for_http(parts.path) or "/"
    query = f"?{fit_for_http(parts.query)}" if parts.query else ""
    return _ESCAPE.sub(lambda found: found[0].upper(), f"{host}{shown}{path}{query}")


def host_of(url: str | None) -> str | None:
    """The host of a web address in its normal form; None when there is none."""
    parts = _parts(url)
    if parts is None:
        return None
    try:
        found = parts.hostname
    except ValueError:
        return None
    return _normal_host(found) if found else None


def asked_host(text: str) -> str:
    """The host that a person means: without case, port, final dot, or `*.` before it.

    Raises ConfigError for what is no host, and for a single label, which would be all of a top-level domain.
    """
    given = text.strip().removeprefix("*.")
    if "://" in given or "/" in given or "@" in given:
        raise ConfigError(f"host {text!r} is an address; give the host alone, such as example.com")
    host = host_of(f"http://{given}/")
    if host is None or not _is_host(host):
        raise ConfigError(f"host {text!r} is no host name; give one such as example.com")
    if "." not in host and not host.startswith("[") and host != "localhost":
        raise ConfigError(
            f"host {text!r} is a single label, which means every host that ends so; give one such as example.{host}"
        )
    return host


def is_of_host(host: str | None, wanted: str) -> bool:
    """Whether a host in its normal form is `wanted` or one of its subdomains."""
    return host is not None and (host == wanted or host.endswith(f".{wanted}"))


def _parts(url: str | None) -> urllib.parse.SplitResult | None:
    if not url or not url.strip():
        return None
    try:
        parts = urllib.parse.urlsplit(url.strip())
    except ValueError:
        return None
    return parts if parts.scheme.lower() in _DEFAULT_PORTS and parts.netloc else None


def _normal_host(host: str) -> str | None:
    """Lower case, no final dot, other scripts as IDNA writes them; an IPv6 address in brackets."""
    name = urllib.parse.unquote(host).strip().lower()
    if ":" in name:
        return f"[{name}]"
    try:
        name = name if name.isascii() else idna.encode(name, uts46=True).decode("ascii")
    except idna.IDNAError:
        return None
    return name.rstrip(".") or None


def _is_host(host: str) -> bool:
    if host.startswith("["):
        return bool(re.fullmatch(r"\[[0-9a-f:.%]+\]", host))
    return all(_LABEL.fullmatch(label) for label in host.split("."))
