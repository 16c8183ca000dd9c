"""The command line: `bootstrap ...`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flows import (
    compare_command,
    decide_command,
    exports,
    ingest_command,
    purge_command,
    recheck_command,
    round_commands,
    sql_command,
    sweep_command,
    why_command,
)
from flows.environment import prepare

if TYPE_CHECKING:
    from flows.settings import BootstrapSettings

STAGES = {
    "ingest": "download new URLs and take in human pairs",
    "pretrain": "train the first model on raw web and human pairs",
    "finetune-captioner": "finetune the captioner on human pairs",
    "finetune-filter": "finetune the filter on human pairs",
    "caption": "write a caption for every web image",
    "score": "score every web and synthetic text",
    "decide": "keep or drop every text by the policy",
    "caption-and-score": "both in one pass over the images",
    "curate": "caption, score and decide",
    "audit": "measure the filter by pairs of known truth, and by a judge",
    "train": "train a new model on the clean set",
    "evaluate": "measure new model and champion on held-out pairs",
    "gate": "promote or refuse the new model",
    "report": "write the round's page",
}


OPTIONS = {"lake": "machine", "on_stale": "machine", "captioner": "caption", "scorer": "score"}
"""Options that are settings, with their sections."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2: something that the user can mend)."""
    options = parser().parse_args(arguments)
    prepare(options.verbose)
    from flows.terminal import fail

    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        return fail("stopped; the same command goes on from here")
    except Exception as err:
        if options.verbose or not _is_ours(err):
            raise
        return fail(str(err))


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    top = argparse.ArgumentParser(prog="bootstrap", description=__doc__.split(". ")[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    run = _command(commands, "run", "run or resume the full cycle, without a server", _run)
    _settings_options(run)
    run.add_argument("--new-round", action="store_true", help="add a round from the champion")
    _settings_options(
        _command(commands, "next-round", "the same as `run --new-round`", _next_round)
    )
    _settings_options(
        _command(commands, "quickstart", "the cycle in a drawn world of known truth", _quickstart)
    )
    for name, text in STAGES.items():
        stage = _command(commands, name, text, _stage)
        _settings_options(stage)
        if name == "decide":
            decide_command.add_options(stage)
        if name == "ingest":
            ingest_command.add_options(stage)
    _model_commands(commands)
    exports.register(commands)
    sweep_command.register(commands, _command)
    why_command.register(commands, _command)
    sql_command.register(commands, _command)
    round_commands.register(commands, _command)
    purge_command.register(commands, _command)
    recheck_command.register(commands, _command, _settings_options)
    compare_command.register(commands, _command, _settings_options)
    repair = _command(
        commands, "repair", "check every committed file, drop what is damaged", _repair
    )
    repair.add_argument("--lake", help="lake to repair")
    shown = _command(commands, "settings", "print the settings a run would use", _settings)
    _settings_options(shown)
    shown.add_argument("--describe", action="store_true", help="every field with its meaning")
    _command(commands, "up", "start a Prefect server and worker, deploy the flows", _up)
    _command(commands, "down", "stop what `up` started", _down)
    return top


def _model_commands(commands: Any) -> None:
    finetune = _command(
        commands,
        "finetune",
        "finetune a BLIP model on captioned pictures, without a lake",
        _finetune,
    )
    finetune.add_argument("model", help="folder or hub name of a BLIP model, or a .pth file")
    finetune.add_argument("--captions", required=True, help="COCO or Karpathy JSON, or a table")
    finetune.add_argument("--images", required=True, help="folder of its pictures")
    finetune.add_argument("--role", choices=("captioner", "filter"), default="captioner")
    _config_options(finetune)
    finetune.set_defaults(preset="base", lake=None, on_stale=None)
    finetune.add_argument("--out", required=True, help="folder to write the model into")
    finetune.add_argument(
        "--layout",
        choices=("own", "hf-captioning", "hf-retrieval"),
        help="own, or a class of transformers; as the role needs when not given",
    )


def _command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    sub.add_argument("-v", "--verbose", action="store_true", help="logs and tracebacks")
    sub.set_defaults(command=run, name=name)
    return sub


def _settings_options(sub: argparse.ArgumentParser) -> None:
    _config_options(sub)
    sub.add_argument("--lake", help="lake to work on")
    sub.add_argument(
        "--on-stale", choices=("error", "rebuild"), help="what to do with outdated parts"
    )
    sub.add_argument("--captioner", metavar="hf:PATH", help="a captioner trained elsewhere")
    sub.add_argument("--scorer", metavar="clip:PATH", help="a scorer trained elsewhere")


def _config_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", "--preset", dest="preset", help="preset in configs/, or a path")
    sub.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one setting, such as pretrain.steps=200; may be repeated",
    )


def settings_from(options: argparse.Namespace, **changes: Any) -> BootstrapSettings:
    """The settings that a command's options name; the quickstart preset without --config."""
    from flows.settings import load_settings, merge

    given: dict[str, Any] = {}
    for name, section in OPTIONS.items():
        if value := getattr(options, name, None):
            given.setdefault(section, {})[name] = value
    return load_settings(options.preset or "quickstart", options.overrides, merge(given, changes))


def _run(options: argparse.Namespace) -> int:
    cycle = "next-round" if options.new_round else "full-cycle"
    return _cycle(settings_from(options, cycle=cycle))


def _next_round(options: argparse.Namespace) -> int:
    return _cycle(settings_from(options, cycle="next-round"))


def _cycle(settings: BootstrapSettings) -> int:
    from flows.bootstrap import bootstrap
    from flows.terminal import console

    with bars():
        result = bootstrap(settings)
    console.print(f"round {result.round}: {result.status}. {result.why}", highlight=False)
    console.print(f"lake:   {result.lake}", highlight=False)
    return 0


def _quickstart(options: argparse.Namespace) -> int:
    from flows.bootstrap import bootstrap
    from flows.quickstart.tour import show

    settings = settings_from(options)
    with bars():
        result = bootstrap(settings)
    show(settings, result)
    return 0


def _stage(options: argparse.Namespace) -> int:
    if options.name == "decide" and decide_command.is_by_hand(options):
        return decide_command.decide_by_hand(options)
    if ingest_command.is_trial(options):
        return ingest_command.try_lists(settings_from(options), options.dry_run)
    from flows import stages
    from flows.terminal import console

    settings = settings_from(options)
    stage = getattr(stages, options.name.replace("-", "_"))
    with bars():
        result = stage(settings)
    console.print(str(result), highlight=False)
    if options.name == "audit":
        _show_audit(settings, result.round)
    return 0


def _show_audit(settings: BootstrapSettings, round: int) -> None:
    from flows.audit.show import audit_figures, audit_table
    from flows.steps.canaries import too_few
    from flows.terminal import console
    from storage import Lake, connect

    lake = Lake.open(settings.machine.lake, read_only=True)
    with connect(lake) as connection:
        figures = audit_figures(connection, round)
        drawn = connection.execute("SELECT count(*) FROM canary_draws WHERE is_canary").fetchall()
    console.print(audit_table(figures))
    least = settings.audit.min_canary_images
    if settings.audit.canary_share and drawn[0][0] < least:
        console.print(too_few(lake.uri, drawn[0][0], least), highlight=False)


def _finetune(options: argparse.Namespace) -> int:
    from flows.finetune import finetune
    from flows.terminal import StageBars, console

    settings = settings_from(options)
    with StageBars() as bars:
        finetune(
            options.model,
            Path(options.captions),
            Path(options.images),
            Path(options.out),
            settings,
            role=options.role,
            layout=options.layout,
            on_progress=partial(bars, options.role),
        )
    console.print(f"model:  {options.out}", highlight=False)
    return 0


def bars() -> Any:
    """Progress of the stages on the terminal, for the length of a `with`."""
    from flows.progress import add_sink
    from flows.terminal import StageBars

    bars = StageBars()
    add_sink(bars)
    return bars


def _repair(options: argparse.Namespace) -> int:
    from flows.terminal import console
    from storage import Lake
    from storage.repair import repair

    lake = Lake.open(find_lake(options.lake))
    with lake.lock("repair", half_purged=True):
        dropped = repair(lake)
    for damage in dropped:
        console.print(f"dropped {damage.path}: {damage.why}", highlight=False)
    console.print(
        f"{len(dropped)} damaged files dropped; run the same command as before to make them anew"
        if dropped
        else "every committed file is as it was committed"
    )
    return 0


def _settings(options: argparse.Namespace) -> int:
    import yaml

    from flows.settings import BootstrapSettings, describe

    if options.describe:
        sys.stdout.write("\n".join(describe(BootstrapSettings)) + "\n")
        return 0
    dumped = settings_from(options).model_dump(mode="json")
    sys.stdout.write(yaml.safe_dump(dumped, sort_keys=False))
    return 0


def _up(options: argparse.Namespace) -> int:
    from flows.server import up
    from flows.terminal import console

    console.print("starting a Prefect server and a worker; this takes about half a minute")
    state = up(Path.cwd())
    console.print(f"UI:    {state.ui_url}", highlight=False)
    console.print(
        "next:  . .venv/bin/activate && prefect deployment run bootstrap/full-cycle --watch",
        highlight=False,
        soft_wrap=True,
    )
    console.print("stop:  make down")
    return 0


def _down(options: argparse.Namespace) -> int:
    from flows.server import down
    from flows.terminal import console

    console.print("stopped" if down(Path.cwd()) else "nothing of ours was running")
    return 0


def find_lake(given: str | None) -> str:
    """--lake, else BOOTSTRAP_LAKE, else the lake used last in this folder."""
    from flows.errors import SettingsError
    from flows.session import LAST_LAKE
    from flows.settings import LAKE_VARIABLE

    if given or os.environ.get(LAKE_VARIABLE):
        return given or os.environ[LAKE_VARIABLE]
    if LAST_LAKE.is_file():
        return LAST_LAKE.read_text(encoding="utf-8").strip()
    raise SettingsError(
        f"no lake given, and none was used in {Path.cwd()} yet: add --lake PATH, set "
        f"{LAKE_VARIABLE}, or run `bootstrap quickstart` here first"
    )


def _is_ours(err: Exception) -> bool:
    from blip_core import BlipError
    from flows.errors import FlowsError
    from storage import StorageError

    return isinstance(err, FlowsError | StorageError | BlipError)


def entry() -> NoReturn:
    """The console script: run `main` and leave.

    Prefect's daemon threads outlive the interpreter's own clean-up, which makes DuckDB's bindings
    report leaks by the page. So the exit handlers (which stop the in-process server) run, and then
    the process ends without that clean-up.
    """
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(status)


if __name__ == "__main__":
    entry()
