"""The command line: `sotto`, a sub-command for each role and purpose.

This module imports typer and the error catalogue, nothing heavier: a sub-command's module is imported when the
sub-command is called, and what it works with when it runs. Every error raised on purpose becomes one clear message on
stderr and the exit code that the catalogue gives it; with `--json` it is one JSON object on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import CATALOGUE, MAX_TEXT_CHARACTERS, UNEXPECTED, ConfigError, InvalidInput, SottoError, meaning
from ..text import brief, shown
from .quick import quicken
from .screen import echo, echo_json

USAGE_REASON: Final = "USAGE"
"""The reason of a command line that cannot be understood."""
USAGE_EXIT: Final = 2
"""As everywhere."""
ABORTED_EXIT: Final = 130
"""128 and the number of SIGINT, as shells have it."""


class _Lazy(NamedTuple):
    """A sub-command that is imported when it is called."""

    module: str
    attribute: str
    help: str


COMMANDS: Final = {
    "demo": _Lazy(".demo", "app", "Train an encrypted, private federation on real data, on this machine."),
    "provision": _Lazy(".provision", "app", "Make the kits of a federation: certificates, keys, shares, settings."),
    "aggregator": _Lazy(".roles", "aggregator_app", "Run the aggregator of a federation."),
    "party": _Lazy(".roles", "party_app", "Run a party: a data owner's node."),
    "jobs": _Lazy(".jobs", "app", "Submit, watch and cancel jobs; fetch their results."),
    "status": _Lazy(".status", "app", "How the aggregator is: its parties, its workers, its queue."),
    "train": _Lazy(".train", "app", "Train on this node alone, with differential privacy; prints an artifact."),
    "artifact": _Lazy(".artifact", "app", "Verify what `sotto train` printed."),
    "budget": _Lazy(".budget", "app", "What was spent of a privacy budget, and what is left."),
    "audit": _Lazy(".audit", "app", "Attack a training configuration: how much does it give away, at least?"),
}


class LazyGroup(TyperGroup):
    """The root group: its help is a table, its sub-commands are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, imported now; None for one that does not exist."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = typer.main.get_command(getattr(import_module(module, __package__), attribute))
        command.name = cmd_name
        return quicken(command)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The table, without importing what it lists."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])
        with formatter.section("Exit codes, with the reasons that --json names"):
            formatter.write_dl([(str(code), meant) for code, meant in exit_codes().items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As the parent, with a suggestion for a name that is nearly right."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


def exit_codes() -> dict[int, str]:
    """Every exit code with what it means: the reasons of the catalogue that have it."""
    found: dict[int, list[str]] = {0: ["success"], USAGE_EXIT: [USAGE_REASON], ABORTED_EXIT: ["interrupted"]}
    for row in CATALOGUE.values():
        found.setdefault(row.exit_code, []).append(row.reason)
    return {code: ", ".join(found[code]) for code in sorted(found)}


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # importing rich for the help would take longer than all the rest
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"sotto {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Sotto: federated learning under lock and key."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The console script `sotto`: run the command line and exit with its code.

    Args:
        argv: arguments without the program's name; `sys.argv[1:]` by default.
    """
    from ..hardening import forbid_core_dumps
    from ..terminals import make_legible

    for stream in (sys.stdout, sys.stderr):
        make_legible(stream)
    forbid_core_dumps()  # here, for all commands: one that holds keys or rows cannot forget it
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code, with every error reported on stderr."""
    arguments = list(arguments)
    as_json = "--json" in arguments
    try:
        result = quicken(typer.main.get_command(app)).main(args=arguments, prog_name="sotto", standalone_mode=False)
    except SottoError as error:
        _report(error, as_json=as_json)
        return meaning(error).exit_code
    except typer.Abort:
        return ABORTED_EXIT
    except ModuleNotFoundError as error:
        from ..extras import explained

        lacking = explained(error)
        if lacking is None:
            _report_unexpected(error, as_json=as_json)
            return UNEXPECTED.exit_code
        _report(lacking, as_json=as_json)
        return meaning(lacking).exit_code
    except UnicodeEncodeError as error:  # not of what is printed (`terminals`): of what was typed, or of a file's name
        part = error.object[error.start : error.end]
        what = "an argument" if any(part in each for each in arguments) else "a file's name"
        way_out = "; set PYTHONUTF8=1 in the environment, or a locale with UTF-8" if error.encoding != "utf-8" else ""
        unnamed = ConfigError(
            f"{what} cannot be used: it has {shown(part)}, which the locale's {error.encoding} has not{way_out}"
        )
        _report(unnamed, as_json=as_json)
        return meaning(unnamed).exit_code
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "format_message"):  # the parser's own: wrong usage
            return _report_usage(error, as_json=as_json)
        _report_unexpected(error, as_json=as_json)
        return UNEXPECTED.exit_code
    return result if isinstance(result, int) else 0


def _report(error: SottoError, *, as_json: bool) -> None:
    if as_json:
        body: dict[str, Any] = {"reason": meaning(error).reason, "message": error.message}
        body |= {"metadata": error.metadata} if error.metadata else {}
        body |= {"problems": list(error.problems)} if isinstance(error, ConfigError) and error.problems else {}
        body |= {"violations": error.violations} if isinstance(error, InvalidInput) and error.violations else {}
        _report_json(body)
        return
    lines: list[str] = []
    if isinstance(error, ConfigError):
        lines = list(error.problems)
    elif isinstance(error, InvalidInput):
        lines = [f"{field}: {problem}" for field, problem in error.violations.items() if field not in error.message]
    # A message that repeats its problems for readers of a log is cut here, where each gets a line of its own.
    headline = error.message.removesuffix("; ".join(lines)).removesuffix(": ") if lines else error.message
    headings, details = ([headline], lines) if headline else (lines, [])  # a message may be its problems, and no more
    echo([f"sotto: {line}" for line in [*headings, *(f"  {line}" for line in details)]], err=True)


def _report_usage(error: Any, *, as_json: bool) -> int:
    if as_json:
        _report_json({"reason": USAGE_REASON, "message": error.format_message()})
    else:
        error.show()
    return int(error.exit_code)


def _report_unexpected(error: Exception, *, as_json: bool) -> None:
    summary = f"unexpected error: {type(error).__name__}: {brief(error, MAX_TEXT_CHARACTERS)}"
    if as_json:
        _report_json({"reason": UNEXPECTED.reason, "message": summary})
        return
    from ..logs import trace_lines

    echo([*trace_lines(error), f"sotto: {summary}"], err=True)


def _report_json(body: dict[str, Any]) -> None:
    echo_json({"error": body}, err=True)
