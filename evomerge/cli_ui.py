"""The command that opens MLflow's user interface on a study."""

from __future__ import annotations

import os
import signal
import sys
import webbrowser
from contextlib import ExitStack
from types import FrameType

import click

from evomerge.cli_arguments import STUDY, open_view
from evomerge.errors import InputError, SetupError


@click.command()
@STUDY
@click.option("--port", type=click.IntRange(1, 65535), default=None, help="A free one if absent.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option(
    "--page", type=click.Choice(["pareto", "front", "overview", "studies"]), default="pareto",
    show_default=True,
    help="MLflow's own charts of the trials, the interactive front, the description, or the list "
    "of all studies of the experiment.",
)  # fmt: skip
def ui(study: str, port: int | None, no_browser: bool, page: str) -> None:
    """Open MLflow on a study.

    Starts MLflow's user interface on this machine, prints the address of the study's page and
    opens it, until Ctrl-C. A study that is tracked on a server is opened there.
    """
    from rich.console import Console

    from evomerge.launch import locate_study
    from evomerge.tracking_target import is_server, pareto_url, studies_url, ui_url
    from evomerge.ui_server import free_port, ui_server
    from evomerge.waiting_line import waiting_line

    console = Console(stderr=True)
    view = open_view(study)
    with waiting_line("MLflow to hold all of the study", console):
        target, synced = locate_study(view)
    chosen = port or free_port()
    if page == "pareto":
        url = pareto_url(target, synced, chosen)
    elif page == "studies":
        url = studies_url(target, synced, chosen)
    else:
        url = ui_url(target, synced, chosen, "front.html" if page == "front" else "")
    if is_server(target):
        if port is not None:
            raise InputError(f"--port: the study is on the server {target.uri}, nothing is started")
        _show(url, no_browser)
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ExitStack() as stack:
            with waiting_line(f"MLflow's user interface to answer on port {chosen}", console):
                process = stack.enter_context(ui_server(target.uri, chosen))
            _show(url, no_browser)
            click.echo("Ctrl-C stops it", err=True)
            code = process.wait()
        raise SetupError(f"MLflow's user interface ended by itself, exit code {code} (try again)")
    except KeyboardInterrupt:
        click.echo("stopped", err=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show(url: str, no_browser: bool) -> None:
    click.echo(url)
    # Without a desktop, webbrowser would start a text browser in this terminal.
    desktop = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    if not no_browser and desktop:
        webbrowser.open(url)
