"""The `ingest` section of the settings: what is taken in, and how it is downloaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from flows.sections import Section
from storage.intake.adopting.image_set import Format
from storage.intake.url_list import ListFormat


class UrlListSettings(Section):
    """One list of image URLs with the texts found beside them."""

    path: str
    """Parquet, CSV or JSONL file, a folder of such files, or a pattern with * or ?; here or an fsspec URI."""
    format: ListFormat = "table"
    """table (columns as named below), or a list as it was published: cc3m, cc12m, laion or datacomp."""
    name: str = "web"
    """The source_name of rows that do not name their own."""
    url_column: str = "url"
    """Column that holds the image's URL."""
    alt_text_column: str = "alt_text"
    """Column that holds the text found with the image."""
    source_name_column: str | None = None
    """Column that names each row's source; `name` serves all rows when not given."""
    licence_column: str | None = None
    """Column that holds each row's licence."""


class ImageSetSettings(Section):
    """One set of pictures that is there already, with the texts found beside them; nothing is downloaded."""

    path: str
    """Folder, file, or pattern with * or ?; here or an fsspec URI. With captions, the folder of the pictures."""
    name: str
    """The source_name of its rows: letters, digits, - and _."""
    format: Format = "auto"
    """img2dataset, webdataset (tars stay where they are), hf (Parquet with pictures in it), folder, table, coco or karpathy."""
    captions: str | None = None
    """Captions file of table, coco and karpathy."""
    image_column: str | None = None
    """Column of the picture: its bytes (hf) or its file (table); the usual names when not given."""
    caption_column: str | None = None
    """Column, JSON field or file ending that holds the texts; the usual ones when not given."""
    url_column: str | None = None
    """Column or JSON field of the address; url when not given."""
    licence_column: str | None = None
    """Column or JSON field of the licence."""
    splits: tuple[str, ...] | None = None
    """Splits of a Karpathy file to take; all when not given."""


class CaptionSetSettings(Section):
    """One set of images with human captions."""

    captions: str
    """COCO captions JSON, Karpathy JSON, or a Parquet/CSV/JSONL table."""
    images: str
    """Folder that the image names are relative to."""
    name: str = "human"
    """Name of the set, shown as source_name: letters, digits, - and _."""
    format: Literal["auto", "coco", "karpathy", "table"] = "auto"
    """Format of the captions file."""
    image_column: str = "image"
    """Column with the image's file name, when the file is a table."""
    caption_column: str = "caption"
    """Column with the caption, when the file is a table."""
    splits: tuple[str, ...] | None = None
    """Splits of a Karpathy file to take; all when not given."""


INGEST_SOURCES = ("url_lists", "image_sets", "human", "heldout")
"""What is taken in, as against how."""
RECHECK_FIELDS = ("recheck_within_rounds", "recheck_most")
"""How what was taken in is asked for again."""


class IngestSettings(Section):
    """What is taken in, and how it is downloaded."""

    url_lists: tuple[UrlListSettings, ...] = ()
    """Lists of URLs; a later round may add more."""
    image_sets: tuple[ImageSetSettings, ...] = ()
    """Pictures that are there already: tars of img2dataset's or others, Parquet files, folders, captions files."""
    human: tuple[CaptionSetSettings, ...] = ()
    """Human pairs to finetune and train on."""
    heldout: tuple[CaptionSetSettings, ...] = ()
    """Human pairs for evaluation only, never trained on."""
    image_size_px: int | None = Field(default=256, ge=16)
    """Shorter side that larger images are reduced to; stored as downloaded when null."""
    min_image_side_px: int = Field(default=1, ge=1)
    """Images with a shorter side below this are refused (the paper used 256 for LAION)."""
    eval_overlap: Literal["drop", "keep"] = "drop"
    """What becomes of a web image that shows what a held-out one or a canary shows, also resized, cropped or framed."""
    near_duplicates: Literal["drop", "keep"] = "keep"
    """What becomes of a web image that shows what an earlier one shows."""
    texts_per_image: int = Field(default=5, ge=1)
    """Most texts of an image: of its first row, and of later ones with its address or its bytes; 1 is the first row's alone."""
    text_rules: tuple[str, ...] = ()
    """Rules that alt texts have to pass: no_letters, too_short, too_long, file_name, url_like, boilerplate, e_mail, phone,
    placeholder, or all."""
    placeholder_addresses: int = Field(default=10, ge=1)
    """Addresses that a text may be found under; more make it a `placeholder`, if that rule is on."""
    repair_texts: bool = False
    """Whether captions are alt texts with wrong encodings and HTML entities repaired; pairs.alt_text stays."""
    mask_personal: bool = False
    """Whether e-mail addresses and telephone numbers in captions become <email> and <phone>; pairs.alt_text stays."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the languages that texts may be in, such as en; others are `language`. All when there is none."""
    language_confidence: float = Field(default=0.95, gt=0, le=1)
    """Least probability that a text is in none of them at which it counts so."""
    language_min_letters: int = Field(default=25, ge=1)
    """Shorter texts are not asked for their language; letters of other scripts than Latin count twice or thrice."""
    safety: str | None = Field(default=None, pattern=r"^(open_nsfw$|python:.)")
    """Check that pictures have to pass, or are `unsafe`: open_nsfw (extra `safety`), or python:FILE.py:FUNCTION, one of
    your own. None when not given."""
    safety_threshold: float = Field(default=0.8, gt=0, le=1)
    """Number of open_nsfw from which a picture is refused."""
    shard_rows: int = Field(default=1000, ge=1)
    """Rows of a list that make one shard."""
    slice_rows: int = Field(default=100_000, ge=1)
    """Rows that one img2dataset process downloads."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that a server may be silent before a download is given up."""
    request_deadline_s: float = Field(default=60.0, gt=0)
    """Seconds until a download is given up however it goes."""
    min_bytes_per_s: int = Field(default=1000, ge=0)
    """A response that is slower is given up, once it has had 5 seconds."""
    max_image_bytes: int = Field(default=50_000_000, ge=1)
    """Reading a response stops there."""
    max_image_pixels: int = Field(default=100_000_000, ge=1)
    """Images with more are refused before they are decoded."""
    max_redirects: int = Field(default=5, ge=0)
    """Redirects that are followed."""
    retry_passes: int = Field(default=2, ge=0)
    """How often rows are asked for again whose failure may pass: timeouts, 5xx, 429, connections, lost rows."""
    retry_wait_s: float = Field(default=10.0, ge=0)
    """Seconds before the first of these passes, doubled before each further one."""
    ask_again_rounds: int = Field(default=2, ge=0)
    """In how many later rounds a row whose failure may pass is asked for again, when its list comes again."""
    per_host: int = Field(default=8, ge=1)
    """Requests at once to one host."""
    host_delay_s: float = Field(default=0.0, ge=0)
    """Seconds between the starts of two requests to one host; robots.txt may ask for more."""
    max_crawl_delay_s: float = Field(default=10.0, ge=0)
    """Longest pause of a robots.txt that is kept to; a host that asks for a longer one is not fetched from."""
    host_failures: int = Field(default=20, ge=1)
    """Failures in a row after which a host is left alone for a while."""
    host_cool_down_s: float = Field(default=60.0, ge=0)
    """Seconds that such a host is left alone; what is asked of it meanwhile fails alike."""
    turn_patience_s: float = Field(default=30.0, gt=0)
    """Longest wait for a turn at a host, in seconds."""
    robots: Literal["honour", "ignore"] = "honour"
    """Whether robots.txt is asked for and kept to."""
    disallowed_headers: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "noml")
    """X-Robots-Tag directives that opt an image out."""
    honour_tdm: bool = True
    """Whether the header `tdm-reservation: 1` opts an image out."""
    allow_addresses: tuple[str, ...] = ()
    """Networks that may be reached although they are not public, as 10.0.0.0/8."""
    recheck_within_rounds: int | None = Field(default=8, ge=1)
    """Before a later round a share of the kept web images is asked for again, all within so many rounds; those that opted
    out since, or were taken down, are purged. null asks for none."""
    recheck_most: int = Field(default=100_000, ge=1)
    """Most images asked for again before one round."""
    distributor: Literal["multiprocessing", "ray"] = "multiprocessing"
    """What hands shards to img2dataset's processes; ray (extra `ray`) is started for the run on this machine, and gone with it."""
    processes: int = Field(default=1, ge=1)
    """Processes of img2dataset."""
    threads: int = Field(default=32, ge=1)
    """Download threads of each process."""
    stall_timeout_s: float = Field(default=120.0, gt=0)
    """Seconds without progress after which img2dataset is killed and resumed."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of one slice before the ingest fails."""
    user_agent_token: str = "blip-bootstrap"
    """Name in the user agent, by which site owners recognise this crawler and robots.txt addresses it."""
    contact_url: str | None = None
    """Page that tells site owners who asks, named in the user agent."""
    http_proxy: str | None = None
    """Forward proxy for all downloads, as http://host:port."""
