"""The section of the settings on comparing policies."""

from __future__ import annotations

from pydantic import Field, field_validator

from flows.sections import Decoding, Section


class CompareSettings(Section):
    """Which policies are compared, and how much each may train; beside the rounds, so no part of what they make."""

    policies: tuple[str, ...] = ("raw", "web_filtered", "all", "blip")
    """Policies, each NAME, or NAME:PARAMETER=VALUE:..., or with the path of a .sql file as NAME; differences are
    to `raw`, or to the first where raw is not among them."""
    decodings: tuple[Decoding, ...] = ()
    """Decodings whose captions are compared, such as nucleus and beam; only the round's own when none is given. Captions
    of another one are written and scored by the round's models, beside the round."""
    seeds: int = Field(default=3, ge=1)
    """Models trained for each policy: with `seed`, with `seed` + 1, and so on."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of each; those of the retraining when not given."""
    round: int | None = Field(default=None, ge=1)
    """Round whose texts are decided on; the latest when not given."""
    keep_models: bool = True
    """Keep the weights of the models when they are measured; their figures stay in any case."""

    @field_validator("policies")
    @classmethod
    def _some_policies(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(text.strip() for text in given)
        if not named or not all(named):
            raise ValueError("name at least one policy, such as raw and blip")
        return named

    @field_validator("decodings")
    @classmethod
    def _different_decodings(cls, given: tuple[Decoding, ...]) -> tuple[Decoding, ...]:
        for decoding in given:
            if given.count(decoding) > 1:
                raise ValueError(f"{decoding} is named twice; name each decoding once")
        return given
