"""Which decision an export follows: the round's active one, or that of a policy by name."""

import json
from collections.abc import Mapping
from typing import Any

from storage import catalog, policy
from storage.errors import ConfigError, EmptyInput
from storage.lake import Lake
from storage.tables import PartRef, list_parts, part_manifest


def last_decided(lake: Lake) -> int:
    """The last round with decisions; EmptyInput when there is none."""
    found = [ref.round for ref in list_parts(lake, "decisions") if ref.round is not None]
    if not found:
        raise EmptyInput(
            f"lake {lake.uri} has no decisions, so there is no clean set to export; run "
            "`bootstrap run`, or the decide stage after captioning and scoring"
        )
    return max(found)


def decided_part(
    lake: Lake, round: int, name: str | None = None, params: Mapping[str, Any] | None = None
) -> PartRef:
    """The decisions that an export follows; a policy that has not decided yet decides now.

    Without a name: those that count in the round. With one: the policy's own, under `params` when
    they are given, else those that count if they are of this policy, else the only ones of it, else
    ones made now with the policy's defaults. A new decision is made beside the others and does not
    become the one that counts; the lake must be held then (`Lake.lock`).

    Raises EmptyInput when the round has no decision to follow, ConfigError when the policy is
    unknown or has decided more than once.
    """
    if params is not None:
        return policy.decide(lake, round, name or _active(lake, round), params, activate=False)
    if name is None:
        name = _active(lake, round)
    found = [ref for ref in list_parts(lake, "decisions", round) if _is_of(lake, ref, name)]
    counting = [ref for ref in found if ref.name == catalog.active_policy(lake, round)]
    if len(found) > 1 and not counting:
        raise ConfigError(
            f"policy {name} has decided round {round} in several ways: "
            f"{', '.join(ref.name for ref in found)}; name one of these with --policy, or give its "
            "parameters with --set"
        )
    if found:
        return (counting or found)[0]
    return policy.decide(lake, round, name, activate=False)


def is_decided(lake: Lake, round: int, name: str | None, params: Mapping[str, Any] | None) -> bool:
    """Whether `decided_part` only has to look: no decision is to be made, and no lock needed."""
    if params is not None:
        return False
    return name is None or any(
        _is_of(lake, ref, name) for ref in list_parts(lake, "decisions", round)
    )


def described(lake: Lake, part: PartRef) -> dict[str, Any]:
    """Policy, generation and parameters of a decision, as its manifest has them."""
    config = part_manifest(lake, part).basis["config"]
    return {"policy": config["policy"], "generation": part.name, "params": config["params"]}


def _active(lake: Lake, round: int) -> str:
    """The name of the decision that counts in a round."""
    parts = list_parts(lake, "decisions", round)
    if not parts:
        decided = sorted({ref.round for ref in list_parts(lake, "decisions") if ref.round})
        known = f"decided are {decided}" if decided else "none is decided yet"
        raise EmptyInput(
            f"round {round} of lake {lake.uri} has no decisions ({known}); run the decide stage "
            "first, or name another round with --round"
        )
    return catalog.active_policy(lake, round) or parts[0].name


def _is_of(lake: Lake, part: PartRef, name: str) -> bool:
    """Whether a decision is the one of that name, or was made by the policy of that name."""
    return name == part.name or json.dumps(name) == json.dumps(described(lake, part)["policy"])
