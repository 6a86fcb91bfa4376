"""Connections between processes, in plain text and in TLS."""

from __future__ import annotations

import pytest

from loadtests.certificates import Authority


@pytest.fixture(scope="session")
def loopback_certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return Authority(tmp_path_factory.mktemp("certificates")).environment()


@pytest.fixture(params=["plain", "tls"])
def plain_and_tls(
    request: pytest.FixtureRequest, loopback_certificates: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What uses it is tested both ways."""
    if request.param == "tls":
        for name, value in loopback_certificates.items():
            monkeypatch.setenv(name, value)
