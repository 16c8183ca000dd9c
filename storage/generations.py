"""Generations: the decisions of a round under one policy and its parameters; which of them counts.

Several lie side by side, each a part of its own. `rounds/NNNN/policy.json` names the active one,
which `clean` and the other views follow, and the one that the round itself was decided by.
"""

import json
from dataclasses import asdict, dataclass

from storage import layout
from storage.errors import ConfigError, LakeError
from storage.lake import Lake
from storage.tables import list_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Active:
    """What a round's `policy.json` says."""

    policy: str
    generation: str
    """Name of the part whose decisions count."""
    of_round: str
    """Generation that the round's own settings made, and its model was trained on."""


def active_generation(lake: Lake, round: int) -> Active | None:
    """The decisions that count in a round, None when none was made to count.

    In older lakes a part is named by its policy, and that is its generation.
    """
    path = layout.round_policy(round)
    try:
        record = json.loads(lake.root.read_bytes(path))
        generation = str(record.get("generation", record["policy"]))
        return Active(
            policy=str(record["policy"]),
            generation=generation,
            of_round=str(record.get("of_round", generation)),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise LakeError(
            f"{lake.uri}/{path} is not readable ({err}); run the decide stage again"
        ) from err


def note_generation(
    lake: Lake, round: int, policy: str, generation: str, *, activate: bool, of_round: bool
) -> None:
    """Let a generation count in a round (`activate`), and be the one of its own settings (`of_round`).

    Where none counts yet, this one is both or neither.
    """
    before = active_generation(lake, round)
    if not activate and (before is None or not of_round):
        return
    after = Active(
        policy=policy if activate or before is None else before.policy,
        generation=generation if activate or before is None else before.generation,
        of_round=generation if of_round or before is None else before.of_round,
    )
    if after != before:
        lake.root.write_bytes(layout.round_policy(round), json.dumps(asdict(after)).encode())


def generation_named(lake: Lake, round: int, name: str) -> str:
    """The one generation of a round that a policy's or generation's name, or its beginning, means."""
    known = [ref.name for ref in list_parts(lake, "decisions", round)]
    if name in known:
        return name
    meant = [each for each in known if each.startswith(name)]
    if len(meant) != 1:
        raise ConfigError(
            f"round {round} of {lake.uri} has {'several' if meant else 'no'} decisions named {name!r}; "
            f"there are {', '.join(known) or 'none'}"
        )
    return meant[0]
