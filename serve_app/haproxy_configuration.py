"""HAProxy as Ray configures it, but for what Ray has no setting for: what Ray wrote is changed before HAProxy reads it.

What is changed closes doors and bounds times, so nothing is passed over: where Ray's file is not as it is known here,
HAProxy does not start, and the reason stands on standard error and beside the file, where `millstream up` finds it.

The launcher runs this file as a program each time that Ray starts HAProxy, so it imports the standard library alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["CLIENT_TIMEOUT", "HTTP_HOST", "UnknownConfiguration", "refusals", "rewritten"]

CLIENT_TIMEOUT: Final = "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"
HTTP_HOST: Final = "MILLSTREAM_HTTP_HOST"
"""Where clients reach HAProxy; where Ray says, if it is not set."""

_KEEP_ALIVE: Final = ("srvtcpka-idle 5s", "srvtcpka-intvl 2s", "srvtcpka-cnt 3")
"""The kernel gives up a silent connection to an ingress after 5 + 3 * 2 seconds without an answer from its host."""
_LOOPBACK: Final = "127.0.0.1"
_CLIENTS, _METRICS, _STATISTICS = "frontend http_frontend", "frontend prometheus", "listen stats"
_SECTION: Final = r"^(?!#)\S"
_UNKNOWN_ROUTE: Final = (
    '{"error":{"message":"Unknown request URL. Completions are at POST /v1/completions.",'
    '"type":"invalid_request_error","param":null,"code":null}}'
)
"""As the ingress has it (deployments/ingress/errors.py, RouteNotFound)."""
_REFUSED_SUFFIX: Final = ".refused"
_WHAT_TO_DO: Final = (
    "Install the version of Ray that requirements/cpu.lock names, or set `proxy: ray` in the section `cluster` of "
    "cluster.yaml, and read in docs/operations.md what a proxy in front must then close."
)


class UnknownConfiguration(Exception):
    """Ray's configuration of HAProxy is not as it is known here; the text says what is missing."""


def rewritten(configuration: str, environment: Mapping[str, str]) -> str:
    """`configuration` as Ray wrote it, or as this function did, with what is added. Raises UnknownConfiguration.

    A request's headers must have arrived in time: else a client that sends a line now and then keeps its connection for
    ever (tests/cluster/test_connection.py). And an ingress whose host is cut off is given up by the kernel, with its
    streams: else their clients wait for ever (tests/rehearsal).

    HAProxy's own metrics and statistics, for which nobody needs a key, are for this machine only: Serve reads its
    counts elsewhere, and Prometheus gets them from Ray. Clients reach it at HTTP_HOST where that is set, whatever
    Serve's own host, at which the ingress replicas listen too (tests/cluster/test_command_line.py).

    Serve's own routes below `/-/` tell of the applications to everybody. All but `/-/healthz`, which KubeRay's probes
    ask for and the rules before have answered, are unknown here, however they are spelled.
    """
    if not (client_timeout_s := environment.get(CLIENT_TIMEOUT)):
        raise UnknownConfiguration(f"the environment variable {CLIENT_TIMEOUT} is not set")
    sections = _sections(configuration)
    added = (f"timeout http-request {client_timeout_s}s", "option srvtcpka", *_KEEP_ALIVE)
    unbounded = re.sub(r"(?m)^ *(timeout http-request|(option )?srvtcpka).*\n", "", _section(sections, "defaults"))
    sections["defaults"] = _replaced(
        unbounded, r"^( *)timeout client .*$", "".join([r"\g<0>", *(rf"\n\1{line}" for line in added)]), "defaults"
    )
    hosts = {_METRICS: _LOOPBACK, _STATISTICS: _LOOPBACK, _CLIENTS: environment.get(HTTP_HOST)}
    for name, host in hosts.items():
        bound = r"\g<0>" if not host else rf"\1 {host}:\2"
        sections[name] = _replaced(_section(sections, name), r"^( *bind) .*:(\d+)$", bound, name)
    if strange := [name for name, text in sections.items() if name not in hosts and re.search(r"(?m)^ *bind ", text)]:
        raise UnknownConfiguration(f"it listens in `{strange[0]}`, which is not known here")
    closed = _replaced(sections[_CLIENTS], r"^( *acl routes) path\b.*$", r"\1 path,url_dec -m beg /-/", _CLIENTS)
    answer = rf"\1 status 404 content-type application/json string '{_UNKNOWN_ROUTE}' if routes"
    sections[_CLIENTS] = _replaced(closed, r"^( *http-request return) .* if routes$", answer, _CLIENTS)
    return "".join(sections.values())


def refusals(folder: Path) -> list[str]:
    """Why HAProxy was not started with the files that Ray wrote in folders of `folder`."""
    return [path.read_text("utf-8") for path in sorted(folder.glob(f"*/*{_REFUSED_SUFFIX}"))]


def _sections(configuration: str) -> dict[str, str]:
    """By their first lines, which are part of them; what stands before the first has the empty text."""
    sections = {"": ""}
    name = ""
    for line in configuration.splitlines(keepends=True):
        if re.match(_SECTION, line):
            name = line.rstrip()
            if name in sections:
                raise UnknownConfiguration(f"the section `{name}` stands in it twice")
            sections[name] = ""
        sections[name] += line
    return sections


def _section(sections: Mapping[str, str], name: str) -> str:
    if name not in sections:
        raise UnknownConfiguration(f"the section `{name}` is not in it")
    return sections[name]


def _replaced(section: str, pattern: str, replacement: str, name: str) -> str:
    """With the one line that matches replaced."""
    text, count = re.subn(pattern, replacement, section, flags=re.MULTILINE)
    if count != 1:
        raise UnknownConfiguration(f"`{name}` has {count} lines like `{pattern}`, expected 1")
    return text


def _main(path: Path) -> None:
    refused = path.with_name(path.name + _REFUSED_SUFFIX)
    try:
        path.write_text(rewritten(path.read_text("utf-8"), os.environ), "utf-8")
    except UnknownConfiguration as unknown:
        reason = f"HAProxy was not started: Ray's {path} cannot be made safe: {unknown}. {_WHAT_TO_DO}"
        refused.write_text(reason, "utf-8")
        sys.exit(reason)
    refused.unlink(missing_ok=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
