"""The command line: its group, its exit codes. Commands are in the modules named cli_*."""

from __future__ import annotations

import errno
import io
import logging
import re
import sys
from typing import NoReturn

import click

from evomerge import (
    __version__,
    cli_calibrate,
    cli_cluster,
    cli_durable,
    cli_launch,
    cli_look,
    cli_take_home,
    cli_ui,
)
from evomerge.errors import EvomergeError, Interrupted

_EXIT_CODES = """\b
Exit codes: 0 done; 1 unexpected bug; 2 invalid input or usage; 3 finished but nothing usable;
4 environment (no GPU, unreachable service); 5 another driver owns the study; 6 storage is full
or corrupt; 130/143 interrupted after a clean checkpoint."""


class _Group(click.Group):
    """Keeps the order of the verbs and suggests one for a typo."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            from evomerge.errors import suggest

            raise click.UsageError(f"no such command {args[0]!r}{suggest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_Group, epilog=_EXIT_CODES, context_settings=_HELP)
@click.version_option(__version__, prog_name="evomerge")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and debug messages.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Search for the best merge of your models.

    \b
    Launch      evomerge init study.yaml --base DIR --expert math=DIR --expert code=DIR
                evomerge check study.yaml
                evomerge run study.yaml        (the same command continues a stopped search)
                evomerge submit study.yaml     (the same on a Ray cluster)
    Look        evomerge front study.yaml
                evomerge compare study.yaml knee base
                evomerge report study.yaml     (one HTML page)
                evomerge ui study.yaml         (MLflow on the study)
    Take home   evomerge export study.yaml --knee --out merged/

    New here? `evomerge demo` trains tiny models, searches their merges and exports the best.
    """
    ctx.obj = verbose
    form = "%(levelname)s %(name)s: %(message)s" if verbose else "%(levelname)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form)
    if verbose:
        logging.getLogger("evomerge").setLevel(logging.DEBUG)


def main() -> NoReturn:
    """Run the command line and exit with the documented code."""
    for stream in (sys.stdout, sys.stderr):
        # Where the encoding has no ± a question mark says enough; a traceback would not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = cli.main(prog_name="evomerge", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("error: stopped; run the same command again", err=True)
        code = 130
    except click.ClickException as error:
        _show(error)
        code = 2
    except (EvomergeError, Interrupted) as error:
        if _verbose():
            logging.getLogger(__name__).debug("traceback", exc_info=True)
        for line in str(error).splitlines():
            click.echo(f"error: {line}" if not line.startswith(" ") else line, err=True)
        code = error.exit_code
    except OSError as error:
        # Files that nobody may read or write; anything else is a bug and keeps its traceback.
        if error.filename is None or _verbose():
            raise
        click.echo(f"error: {error.filename}: {error.strerror}", err=True)
        code = 6 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    sys.exit(code if isinstance(code, int) else 0)


def _show(error: click.ClickException) -> None:
    """Print an error of usage as click does, but led in like all others."""
    shown = io.StringIO()
    error.show(shown)
    text = re.sub(r"^Error: ", "error: ", shown.getvalue(), flags=re.MULTILINE)
    click.echo(text, err=True, nl=False)


def _verbose() -> bool:
    return "-v" in sys.argv or "--verbose" in sys.argv


for _command in (
    cli_launch.demo,
    cli_launch.init,
    cli_launch.check,
    cli_launch.run,
    cli_cluster.submit,
    cli_cluster.logs,
    cli_cluster.stop,
    cli_look.front,
    cli_look.compare,
    cli_look.report,
    cli_look.status,
    cli_ui.ui,
    cli_take_home.export,
    cli_take_home.verify,
    cli_take_home.merge,
    cli_take_home.directions,
    cli_launch.bench,
    cli_calibrate.calibrate,
    cli_look.list_,
    cli_launch.schema,
    cli_look.sync,
    cli_durable.extend,
    cli_durable.replay,
):
    cli.add_command(_command)


if __name__ == "__main__":
    main()
