"""The command line. Thin over the configuration, the Ray node and Serve's REST API."""

import typer

from serve_app.cli.check import check
from serve_app.cli.down import down
from serve_app.cli.status import status
from serve_app.cli.up import up

__all__ = ["app"]

app = typer.Typer(
    help="An OpenAI-compatible completions cluster on Ray Serve and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (up, status, check, down):
    app.command()(command)
