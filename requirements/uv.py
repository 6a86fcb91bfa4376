"""Runs uv with what pip is configured with: `python requirements/uv.py pip install …`.

uv does not read pip's configuration, and a machine that gets its packages from elsewhere than the default index (a
mirror, a folder of wheels, a proxy) says so there: in its files or in PIP_* variables. uv's own settings hold as well.
Standard library only: it runs before anything is installed, in the environment whose pip is asked.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

SECTIONS = ("global", "install", ":env:")
"""Of pip's configuration, the later ones first in rank. Within one, pip has merged its files already."""

OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


def pip_configuration() -> dict[str, str]:
    """What `pip install` would go by. `pip config list` has lines such as `global.find-links='a b'`."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    sections: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in sections:
            sections[section][key] = str(ast.literal_eval(value))
    return {key: value for section in SECTIONS for key, value in sections[section].items()}


def uv_options(configuration: Mapping[str, str]) -> list[str]:
    """pip takes the best version of all its sources; uv, unless told, the best of the first that knows the package."""
    options = ["--index-strategy", "unsafe-best-match"]
    if configuration.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    for key, option in OPTIONS.items():
        for value in configuration.get(key, "").split():
            if key == "find-links" and not _is_there(value):
                print(f"pip's find-links names {value}, which is not there: left out.", file=sys.stderr)
            else:
                options += [option, value]
    return options


def uv_variables(configuration: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with what it lacks of pip's settings."""
    told = {VARIABLES[key]: value for key, value in configuration.items() if key in VARIABLES and value}
    return {**told, **environment}


def _is_there(link: str) -> bool:
    """Whether a source is a page, or a file or folder that exists. uv ends where it does not; pip goes on."""
    url = urlsplit(link)
    if url.scheme in ("http", "https"):
        return True
    return Path(url2pathname(url.path) if url.scheme == "file" else link).expanduser().exists()


def main(arguments: list[str]) -> None:
    """`--only-from SOURCE`, first, takes an address of an index or a folder of wheels in place of all others."""
    configuration = pip_configuration()
    if arguments[:1] == ["--only-from"]:
        source, arguments = arguments[1], arguments[2:]
        is_folder = Path(source).is_dir()
        options = ["--no-index", "--find-links", source] if is_folder else ["--default-index", source]
        options += uv_options({key: value for key, value in configuration.items() if key == "trusted-host"})
    else:
        options = uv_options(configuration)
    uv = str(Path(sys.executable).parent / "uv")
    os.execve(uv, [uv, *arguments, *options], uv_variables(configuration, os.environ))


if __name__ == "__main__":
    main(sys.argv[1:])
