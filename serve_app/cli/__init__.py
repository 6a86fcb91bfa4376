"""The command line. Thin over the configuration, the Ray node, Serve's REST API and the meter's database.

Its modules import neither Ray nor SQLAlchemy until a command needs them: most commands take a fraction of a second.
"""

import typer

from serve_app.cli.calibrate import calibrate
from serve_app.cli.check import check
from serve_app.cli.down import down
from serve_app.cli.keys import keys
from serve_app.cli.plan import plan
from serve_app.cli.render import render
from serve_app.cli.status import status
from serve_app.cli.teams import teams
from serve_app.cli.up import up
from serve_app.cli.usage import usage

__all__ = ["app"]

app = typer.Typer(
    help="An OpenAI-compatible completions cluster on Ray Serve and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (up, status, check, down, plan, calibrate):
    app.command()(command)
app.add_typer(keys, name="keys")
app.add_typer(teams, name="teams")
app.add_typer(usage, name="usage")
app.add_typer(render, name="render")
