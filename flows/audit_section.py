"""The section of the settings on auditing the filter."""

from __future__ import annotations

from pydantic import Field

from flows.sections import Section


class AuditSettings(Section):
    """How the filter is audited; measured beside the loop, so never part of what a round is made of.

    The draw of canaries is pinned by itself: an image stays what it was drawn as.
    """

    canary_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the human images that is kept out of all training to audit filters with; 0 audits nothing."""
    max_canary_images: int = Field(default=500, ge=0)
    """Most such images; 500 give shares to +-0.04."""
    min_canary_images: int = Field(default=20, ge=2)
    """With fewer than these there are no figures: their intervals would say nothing."""
    judge: str = Field(default="first", pattern=r"^(first$|clip:.|open_clip:.|blip:.)")
    """The scorer outside the loop: `first` is the lake's first filter, or clip:PATH, open_clip:PATH, blip:PATH."""
    judge_sample: int = Field(default=1000, ge=0)
    """Texts of each round that the judge scores too."""
    precision: float = Field(default=0.95, gt=0, lt=1)
    """The threshold that would reach this precision is reported."""
