"""What is fetched, what is kept of it, how hard it is tried, and what is honoured on the way."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from storage.errors import ConfigError
from storage.intake.fetching.addresses import address_rules
from storage.intake.fetching.hosts import HostRules
from storage.intake.fetching.opener import OpenerConfig
from storage.intake.own_ray import require_ray
from storage.intake.safety import Safety
from storage.intake.text_rules import PLACEHOLDER, checked_rules

AS_BEFORE: dict[str, Any] = {
    "texts_per_image": 1,
    "ask_again_rounds": 0,
    "placeholder_addresses": 10,
    "repair_texts": False,
    "mask_personal": False,
    "languages": (),
    "language_confidence": 0.95,
    "language_min_letters": 25,
    "safety": None,
}
"""Fields younger than the first lakes, with the value that does what was done before them: with that they are no part
of a fingerprint, so that those lakes stay valid for whoever gives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """What is fetched, what is kept of it, and how hard it is tried."""

    image_size_px: int | None = None
    """Shrink the shorter side of larger images to this, re-encoded as JPEG; None stores the bytes
    as they were served. Some damage to an image is only seen in the bytes as served."""
    min_image_side_px: int = 1
    max_image_pixels: int = 100_000_000
    max_image_bytes: int = 50_000_000
    """Reading a response stops there."""
    timeout_s: float = 10.0
    """Silence of a server after which a request fails."""
    request_deadline_s: float = 60.0
    """Bound on a whole response, from the connection on, however steadily it drips."""
    min_bytes_per_s: int = 1000
    """A response that is slower is given up, once it has had 5 seconds."""
    max_redirects: int = 5
    user_agent_token: str = "blip-bootstrap"
    """What the fetcher calls itself; servers can opt it out by this name."""
    disallowed_headers: tuple[str, ...] = (
        "noai",
        "noimageai",
        "noindex",
        "noimageindex",
        "noml",
    )
    """X-Robots-Tag directives that opt an image out."""
    contact_url: str | None = None
    """Where whoever runs a site finds out who asks, as part of the user agent."""
    robots: Literal["honour", "ignore"] = "honour"
    """Whether robots.txt is asked for and kept to (RFC 9309)."""
    honour_tdm: bool = True
    """Whether `tdm-reservation: 1` opts an image out."""
    allow_addresses: tuple[str, ...] = ()
    """Networks that may be reached although they are not public, as 10.0.0.0/8."""
    per_host: int = 8
    """Requests at once to one host."""
    host_delay_s: float = 0.0
    """Pause between the starts of two requests to one host; robots.txt may ask for a longer one."""
    max_crawl_delay_s: float = 10.0
    """Longest pause of a robots.txt that is kept to; a host that asks for a longer one is not fetched from."""
    host_failures: int = 20
    """Failures in a row after which a host is left alone for a while; what is asked of it meanwhile fails alike."""
    host_cool_down_s: float = 60.0
    turn_patience_s: float = 30.0
    """Longest wait for a turn at a host."""
    retry_passes: int = 2
    """How often rows are asked for again whose failure may pass: timeouts, 5xx, 429, connections, lost rows."""
    retry_wait_s: float = 10.0
    """Wait before the first of these passes, doubled before each further one."""
    ask_again_rounds: int = 0
    """In how many later rounds a row whose failure may pass is asked for again, when its list comes again."""
    http_proxy: str | None = None
    """Proxy for http addresses; None takes the environment's."""
    distributor: Literal["multiprocessing", "ray"] = "multiprocessing"
    """What hands shards to img2dataset's processes; `ray` is one of the run's own, on this machine."""
    processes: int = 1
    threads: int = 16
    """Requests at once in each process."""
    eval_overlap: Literal["drop", "keep"] = "drop"
    """What becomes of an image that shows what a held-out one or a canary shows."""
    near_duplicates: Literal["drop", "keep"] = "keep"
    """What becomes of an image that shows what another web image shows."""
    texts_per_image: int = 5
    """Most texts of an image: those of its first row, and of later ones with its address or its bytes. 1 is the first alone."""
    text_rules: tuple[str, ...] = ()
    """Rules that alt texts have to pass, by name (`text_rules.RULES`); `all` is every one."""
    placeholder_addresses: int = 10
    """Addresses that a text may be found under; more make it a `placeholder`."""
    repair_texts: bool = False
    """Whether captions are alt texts with wrong encodings and HTML entities repaired."""
    mask_personal: bool = False
    """Whether e-mail addresses and telephone numbers in captions are masked."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the languages that texts may be in; all when there is none."""
    language_confidence: float = 0.95
    """Least probability that a text is in none of them at which it counts so."""
    language_min_letters: int = 25
    """Shorter texts are not asked for their language; letters of other scripts than Latin count twice or thrice."""
    safety: Safety | None = None
    """Check that pictures have to pass."""
    shard_rows: int = 1000
    """Rows of the list that one shard holds."""
    slice_rows: int = 1_000_000
    """Rows of the list that one run of img2dataset is given."""
    stall_timeout_s: float = 120.0
    """Time without any progress after which a run is ended and begun again."""
    max_restarts: int = 3
    """Restarts in a row that may fail to finish a single shard more."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in (
            "min_image_side_px",
            "max_image_pixels",
            "max_image_bytes",
            "processes",
            "threads",
            "shard_rows",
            "slice_rows",
            "per_host",
            "host_failures",
            "texts_per_image",
            "placeholder_addresses",
            "language_min_letters",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("timeout_s", "request_deadline_s", "stall_timeout_s", "turn_patience_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be more than 0, got {getattr(self, name)}")
        if self.image_size_px is not None and self.image_size_px < 1:
            raise ConfigError(f"image_size_px must be 1 or more, got {self.image_size_px}")
        for name in (
            "max_restarts",
            "min_bytes_per_s",
            "max_redirects",
            "host_delay_s",
            "max_crawl_delay_s",
            "host_cool_down_s",
            "retry_passes",
            "retry_wait_s",
            "ask_again_rounds",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.distributor not in ("multiprocessing", "ray"):
            raise ConfigError(
                f"distributor must be multiprocessing or ray, got {self.distributor!r}"
            )
        if self.distributor == "ray":
            require_ray()
        checked_rules(self.text_rules)
        if strange := [name for name in self.languages if not re.fullmatch("[a-z]{2,3}", name)]:
            raise ConfigError(
                f"languages: {strange[0]!r} is no code of a language; give such as en, de, zh"
            )
        if not 0 < self.language_confidence <= 1:
            raise ConfigError(
                f"language_confidence must be more than 0, 1 at most, got {self.language_confidence}"
            )
        try:
            address_rules(self.allow_addresses)
        except ValueError as err:
            raise ConfigError(
                f"allow_addresses: {err}; write networks as 10.0.0.0/8 or single addresses"
            ) from err

    def data_settings(self) -> dict[str, Any]:
        """The fields that shape what is stored, as against how it is fetched."""
        settings: dict[str, Any] = {
            "image_size_px": self.image_size_px,
            "min_image_side_px": self.min_image_side_px,
            "max_image_pixels": self.max_image_pixels,
            "max_image_bytes": self.max_image_bytes,
            "user_agent_token": self.user_agent_token,
            "disallowed_headers": list(self.disallowed_headers),
            "robots": self.robots,
            "honour_tdm": self.honour_tdm,
            "max_redirects": self.max_redirects,
            "eval_overlap": self.eval_overlap,
            "near_duplicates": self.near_duplicates,
            "text_rules": list(checked_rules(self.text_rules)),
            "shard_rows": self.shard_rows,
        }
        younger = {name: getattr(self, name) for name in AS_BEFORE}
        younger["safety"] = self.safety and self.safety.id
        return settings | {k: v for k, v in younger.items() if v != AS_BEFORE[k]}

    @property
    def placeholder_most(self) -> int | None:
        """The most addresses of a text that is no placeholder; None when the rule is off."""
        is_on = PLACEHOLDER in checked_rules(self.text_rules)
        return self.placeholder_addresses if is_on else None

    @property
    def opener(self) -> OpenerConfig:
        """Bounds on each request."""
        return OpenerConfig(
            agent=self.user_agent_token,
            contact_url=self.contact_url,
            addresses=self.allow_addresses,
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            # Without resizing nobody decodes the image before it is inspected.
            check_pixels=self.image_size_px is not None,
            deadline_s=self.request_deadline_s,
            min_bytes_per_s=self.min_bytes_per_s,
            max_redirects=self.max_redirects,
            opt_out_directives=self.disallowed_headers,
            honour_tdm=self.honour_tdm,
            proxy=self.http_proxy,
        )

    @property
    def host_rules(self) -> HostRules:
        """How hosts are treated."""
        return HostRules(
            agent=self.user_agent_token,
            honour_robots=self.robots == "honour",
            per_host=self.per_host,
            delay_s=self.host_delay_s,
            max_crawl_delay_s=self.max_crawl_delay_s,
            failures=self.host_failures,
            cool_down_s=self.host_cool_down_s,
        )
