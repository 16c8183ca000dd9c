"""Which decisions an export follows: the round's active ones, or those of a policy by name."""

from collections.abc import Mapping
from typing import Any

from storage import policy
from storage.errors import ConfigError, EmptyInput
from storage.generations import active_generation
from storage.lake import Lake
from storage.policy_file import read_policy
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

    Without a name: those that count in the round. With one: the generation of that name, or the policy's: under
    `params` when they are given, else those that count if they are of this policy, else the only ones of
    it, else ones made now with the policy's defaults. New decisions lie beside the others and do
    not become the ones that count; the lake must be held then (`Lake.lock`).

    Raises EmptyInput when the round has no decisions to follow, ConfigError when the policy is
    unknown or has decided more than once.
    """
    found = found_part(lake, round, name, params)
    if found is not None:
        return found
    return policy.decide(lake, round, _policy(lake, round, name), params, activate=False)


def found_part(
    lake: Lake, round: int, name: str | None, params: Mapping[str, Any] | None
) -> PartRef | None:
    """The decisions that `decided_part` gives when it has none to make, which needs no lock; else None."""
    parts = list_parts(lake, "decisions", round)
    if params is not None:
        asked = read_policy(_policy(lake, round, name))
        wanted = asked.generation(asked.params(params))
        return next((ref for ref in parts if ref.name == wanted), None)
    active = active_generation(lake, round)
    if name is None:
        name = active.generation if active else _first(lake, round)
    named = next((ref for ref in parts if ref.name == name), None)
    if named is not None:
        return named
    of_policy = [ref for ref in parts if described(lake, ref)["policy"] == name]
    counting = [ref for ref in of_policy if active and ref.name == active.generation]
    if len(of_policy) > 1 and not counting:
        raise ConfigError(
            f"policy {name} has decided round {round} in several ways: "
            f"{', '.join(ref.name for ref in of_policy)}; name one of these with --policy, or give "
            "its parameters with --set"
        )
    return next(iter(counting or of_policy), None)


def described(lake: Lake, part: PartRef) -> dict[str, Any]:
    """Policy, generation and parameters of decisions, as their manifest has them."""
    config = part_manifest(lake, part).basis["config"]
    return {"policy": config["policy"], "generation": part.name, "params": config["params"]}


def _policy(lake: Lake, round: int, name: str | None) -> str:
    """The policy that is named, else that of the decisions that count."""
    if name is not None:
        return name
    active = active_generation(lake, round)
    return active.policy if active else _first(lake, round)


def _first(lake: Lake, round: int) -> str:
    """The first decisions of a round in which none was made to count."""
    parts = list_parts(lake, "decisions", round)
    if not parts:
        decided = sorted({ref.round for ref in list_parts(lake, "decisions") if ref.round})
        known = f"decided are {decided}" if decided else "none is decided yet"
        raise EmptyInput(
            f"round {round} of lake {lake.uri} has no decisions ({known}); run the decide stage "
            "first, or name another round with --round"
        )
    return parts[0].name
