"""`python -m serve_app.cli`: the command line without its entry point."""

from serve_app.cli import app

app(prog_name="millstream")
