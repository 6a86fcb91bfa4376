"""Builds a container image: `python3 -m requirements.image cpu`. `make image` calls it.

k8s/Dockerfile installs packages as `make` does, and so from the same sources: what pip and uv are told on this machine
goes into the build as secrets (variables of a shell, and certificates), of which nothing stays in the image. Standard
library only, for any Python from 3.9 on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from requirements.uv import OPTIONS, VARIABLES, pip_configuration

ROOT = Path(__file__).parents[1]
BUILDERS = ("docker", "podman", "buildah")
"""In the order in which they are tried. All build with `NAME build`."""
CERTIFICATES = ("cert", "client-cert")
"""Of pip's options those that name a file, which becomes the secret of that name."""
VARIABLE_PREFIXES = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "MILLSTREAM_TORCH_INDEX")


class ImageError(Exception):
    """Why no image can be built; the text says what to do."""


@dataclass(frozen=True)
class Sources:
    """Where packages come from on this machine."""

    variables: Mapping[str, str]
    """PIP_*, UV_* and MILLSTREAM_TORCH_INDEX, as the build has them."""
    secrets: Mapping[str, Path]
    """Certificates, by the secret's name."""
    folders: Sequence[Path]
    """What the variables name here on the disk."""


def package_sources(configuration: Mapping[str, str], environment: Mapping[str, str], *, folders: bool) -> Sources:
    """`configuration` is pip's. Without `folders`, sources that are such are left out, and told."""
    secrets = {key: Path(configuration[key]).expanduser() for key in CERTIFICATES if configuration.get(key)}
    passed = [key for key in (*OPTIONS, *VARIABLES, "no-index") if key in configuration and key not in CERTIFICATES]
    variables = {_variable(key): configuration[key] for key in passed}
    variables |= {name: value for name, value in environment.items() if name.startswith(VARIABLE_PREFIXES)}
    found: list[Path] = []
    for name, value in variables.items():
        kept = []
        for word in value.split():
            folder = _folder(word)
            if folder is not None and not folders:
                print(f"docker build cannot mount {folder}, which {name} names: left out.", file=sys.stderr)
                continue
            kept.append(word)
            if folder is not None:
                found.append(folder)
        variables[name] = " ".join(kept)
    variables |= {_variable(key): f"/run/secrets/{key}" for key in secrets}
    return Sources({name: value for name, value in variables.items() if value}, secrets, list(dict.fromkeys(found)))


def build_command(builder: str, variant: str, tag: str, base: str | None, sources: Sources, script: Path) -> list[str]:
    """`script` holds the variables of `sources`."""
    secrets = {"sources": script, **sources.secrets}
    return [
        *(builder, "build", "--file", "k8s/Dockerfile", "--tag", tag, "--build-arg", f"VARIANT={variant}"),
        *(("--build-arg", f"BASE={base}") if base else ()),
        *(word for name, path in secrets.items() for word in ("--secret", f"id={name},src={path}")),
        *(word for folder in sources.folders for word in ("--volume", f"{folder}:{folder}:ro")),
    ]


def find_builder(names: Sequence[str]) -> str:
    """The first of `names` that works. docker's command may be there without its daemon."""
    for name in names:
        if shutil.which(name) and subprocess.run([name, "version"], capture_output=True, check=False).returncode == 0:
            return name
    raise ImageError(f"No {' or '.join(names)} that works here: apt-get install buildah, or start docker's daemon.")


def _variable(key: str) -> str:
    """By which pip reads this of its options from the environment."""
    return f"PIP_{key.upper().replace('-', '_')}"


def _folder(source: str) -> Path | None:
    """What a build must see of a source on this disk. The pages of an index link to files beside it."""
    url = urlsplit(source)
    if url.scheme not in ("", "file"):
        return None
    path = Path(url2pathname(url.path) if url.scheme else source).expanduser()
    if not path.is_dir() or not path.is_absolute():
        return None
    is_index = url.scheme == "file" and len(path.parts) > 2 and any(path.glob("*/index.html"))
    return path.parent if is_index else path


def _version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def main(arguments: Sequence[str]) -> int:
    """What is left of `arguments` goes to the builder."""
    parser = argparse.ArgumentParser(prog="requirements.image")
    parser.add_argument("variant", choices=("cpu", "gpu"))
    parser.add_argument("--tag")
    parser.add_argument("--base")
    parser.add_argument("--builder", choices=BUILDERS)
    options, added = parser.parse_known_args(arguments)
    tag = options.tag or f"millstream-{options.variant}:{_version()}"
    try:
        builder = find_builder([options.builder] if options.builder else BUILDERS)
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1
    if importlib.util.find_spec("pip"):
        configuration = pip_configuration()
    else:
        print(f"{sys.executable} has no pip to ask for its configuration: taken as empty.", file=sys.stderr)
        configuration = {}
    sources = package_sources(configuration, os.environ, folders=builder != "docker")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "sources"
        script.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in sources.variables.items()))
        command = build_command(builder, options.variant, tag, options.base, sources, script)
        environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
        status = subprocess.run([*command, *added, "."], cwd=ROOT, env=environment, check=False).returncode
    if status == 0:
        print(f"{tag}, built with {builder}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
