"""Addresses as people list them, made fit for HTTP."""

import pytest

from storage.intake.plan import fit_for_http


@pytest.mark.parametrize(
    ("listed", "fetched"),
    [
        ("http://a.test/b.jpg", "http://a.test/b.jpg"),
        ("  https://a.test/b.jpg\n", "https://a.test/b.jpg"),
        ("http://a.test/a b.jpg?q=ü#x", "http://a.test/a%20b.jpg?q=%C3%BC#x"),
        ("http://a.test/a%20b.jpg", "http://a.test/a%20b.jpg"),
        ("http://bücher.example/é.jpg", "http://xn--bcher-kva.example/%C3%A9.jpg"),
        ("http://BÜCHER.example:8080/a.jpg", "http://xn--bcher-kva.example:8080/a.jpg"),
        ("http://例え.テスト/a.jpg", "http://xn--r8jz45g.xn--zckzah/a.jpg"),
        ("http://[::1]:80/a.jpg", "http://[::1]:80/a.jpg"),
        ("http://a.test/" + "x" * 8000, "http://a.test/" + "x" * 8000),
    ],
)
def test_address_is_made_fit(listed: str, fetched: str) -> None:
    assert fit_for_http(listed) == (fetched, None)


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (None, "no address"),
        ("", "no address"),
        ("   ", "no address"),
        ("file:///etc/passwd", "not an http"),
        ("ftp://a.test/a.jpg", "not an http"),
        ("data:image/png;base64,AAAA", "not an http"),
        ("javascript:alert(1)", "not an http"),
        ("a.test/b.jpg", "not an http"),
        ("http:///a.jpg", "not an http"),
        ("http://[::1/a.jpg", "Invalid IPv6"),
        ("http://a.test:notaport/a.jpg", "Port"),
        ("http://a.test:99999/a.jpg", "Port out of range"),
        ("http://ü..example/a.jpg", "is no host name"),
    ],
)
def test_what_is_no_address_of_the_web_is_said_to_be_none(listed: str | None, words: str) -> None:
    fetched, problem = fit_for_http(listed)
    assert fetched is None
    assert words in (problem or "")
