"""Two spellings of an address are one, and a host has its subdomains and nobody else's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.addresses import asked_host, host_of, is_of_host, normal
from storage.errors import ConfigError

LABEL = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
HOST = st.lists(LABEL, min_size=2, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://Example.COM/a.jpg", "http://example.com/a.jpg"),
        ("http://example.com:80/a.jpg", "http://example.com/a.jpg"),
        ("https://example.com:443/a.jpg", "http://example.com/a.jpg"),
        ("  http://example.com/a b.jpg#top ", "http://example.com/a%20b.jpg"),
        ("http://example.com./a%2fb", "http://example.com/a%2Fb"),
        ("http://bücher.example/ü.jpg", "http://xn--bcher-kva.example/%C3%BC.jpg"),
        ("http://user:secret@example.com/a", "http://example.com/a"),
        ("http://example.com", "http://example.com/"),
    ],
)
def test_spellings_of_one_address_have_one_normal_form(one: str, other: str) -> None:
    assert normal(one) == normal(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://example.com/a.jpg", "http://example.com/A.jpg"),
        ("http://example.com/a.jpg", "http://example.com/a.jpg?size=2"),
        ("http://example.com:8080/a.jpg", "http://example.com/a.jpg"),
        ("http://www.example.com/a.jpg", "http://example.com/a.jpg"),
    ],
)
def test_different_addresses_stay_different(one: str, other: str) -> None:
    assert normal(one) != normal(other)


@pytest.mark.parametrize(
    "text", [None, "", "ftp://example.com/a", "a.jpg", "http://", "http://[broken", "http://x:y/a"]
)
def test_what_is_no_web_address_has_no_normal_form(text: str | None) -> None:
    assert normal(text) is None


@pytest.mark.parametrize(
    ("host", "wanted", "is_of"),
    [
        ("example.com", "example.com", True),
        ("a.example.com", "example.com", True),
        ("a.b.example.com", "example.com", True),
        ("notexample.com", "example.com", False),
        ("example.com.evil.test", "example.com", False),
        ("com", "example.com", False),
        ("example.com", "a.example.com", False),
        (None, "example.com", False),
    ],
)
def test_a_host_is_itself_and_its_subdomains(host: str | None, wanted: str, is_of: bool) -> None:
    assert is_of_host(host, wanted) is is_of


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("Example.COM.", "example.com"),
        ("example.com:8080", "example.com"),
        ("*.example.com", "example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("localhost", "localhost"),
        ("[2001:DB8::1]:80", "[2001:db8::1]"),
    ],
)
def test_asked_host_is_meant_whatever_its_spelling(given: str, host: str) -> None:
    assert asked_host(given) == host


@pytest.mark.parametrize(
    "text", ["", "com", "http://example.com/", "a b.com", "user@example.com", "-.com", "a..b"]
)
def test_asked_host_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="host"):
        asked_host(text)


@given(
    host=HOST,
    label=LABEL,
    port=st.integers(1, 65535),
    path=st.from_regex(r"[a-z/]{0,9}", fullmatch=True),
)
def test_host_of_any_address_below_a_host_is_of_it(
    host: str, label: str, port: int, path: str
) -> None:
    wanted = asked_host(host.upper())
    for prefix in ("", f"{label}."):
        found = host_of(f"HTTP://{prefix}{host.upper()}:{port}/{path}")
        assert is_of_host(found, wanted)
    assert not is_of_host(host_of(f"http://{label}{host}/{path}"), wanted)
    assert not is_of_host(host_of(f"http://{host}.{label}/"), wanted) or f"{host}.{label}".endswith(
        f".{host}"
    )
