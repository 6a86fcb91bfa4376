"""requirements/uv.py: uv is told what pip is configured with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from requirements.uv import pip_configuration, uv_options, uv_variables


@pytest.fixture
def pip_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only configuration that pip reads, machine-wide files aside."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(path))
    return path


def test_later_sections_and_the_environment_outrank_the_global_one(
    pip_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_file.write_text(
        "[global]\nindex-url = http://a.test/simple\nfind-links = /a\ntimeout = 3\n[install]\nfind-links = /b\n"
    )
    assert pip_configuration()["find-links"] == "/b"
    monkeypatch.setenv("PIP_FIND_LINKS", "/c /d")
    configuration = pip_configuration()
    assert (configuration["find-links"], configuration["index-url"]) == ("/c /d", "http://a.test/simple")


def test_each_source_of_pip_becomes_one_of_uvs(tmp_path: Path) -> None:
    options = uv_options(
        {
            "index-url": "http://a.test/simple",
            "extra-index-url": "\nhttp://b.test/simple\nfile:///c/simple",
            "find-links": f"{tmp_path} http://d.test/wheels",
            "trusted-host": "a.test",
            "no-index": "true",
        }
    )
    assert options == [
        *("--index-strategy", "unsafe-best-match", "--no-index"),
        *("--default-index", "http://a.test/simple"),
        *("--index", "http://b.test/simple", "--index", "file:///c/simple"),
        *("--find-links", str(tmp_path), "--find-links", "http://d.test/wheels"),
        *("--allow-insecure-host", "a.test"),
    ]


def test_a_folder_that_is_not_there_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert "--find-links" not in uv_options({"find-links": str(missing)})
    assert str(missing) in capsys.readouterr().err


def test_what_uv_is_told_itself_outranks_pips_settings() -> None:
    configuration = {"cert": "/a.pem", "proxy": "http://proxy.test", "timeout": "9"}
    variables = uv_variables(configuration, {"SSL_CERT_FILE": "/b.pem"})
    assert variables == {"SSL_CERT_FILE": "/b.pem", "ALL_PROXY": "http://proxy.test", "UV_HTTP_TIMEOUT": "9"}
