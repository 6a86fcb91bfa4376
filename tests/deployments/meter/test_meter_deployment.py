"""MeterDeployment as Serve drives it, without Serve."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from deployments.contracts import (
    AdmissionRequest,
    Admitted,
    KeyInfo,
    Settlement,
    pack,
    unpack,
    unpack_admissions,
)
from deployments.meter.deployment import MeterDeployment
from deployments.meter.errors import AdminKeyError, MeterClosed
from deployments.meter.keys import ADMIN_KEY_VARIABLE, key_digest
from deployments.meter.ledger import Ledger
from tests.deployments.meter.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)


def deploy(home: Path, *, require_keys: bool = True) -> MeterDeployment:
    return MeterDeployment(str(home), f"sqlite:///{home}/ledger.db", require_keys)


async def stop(deployment: MeterDeployment) -> None:
    """As Serve's replica does."""
    closing = deployment.__del__()
    assert closing is not None
    await closing


async def test_one_request_from_its_key_to_its_row(tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = save_tiny_tokenizer(tmp_path / "tiny")
    meter = deploy(home)
    await meter.reconfigure({"models": [{"name": "tiny", "folder": str(folder), "max_model_len": 64}]})
    await meter.ping()
    await meter.check_health()

    key = (home / "admin.key").read_text().strip()
    info = unpack(await meter.authenticate(key_digest(key)), KeyInfo)
    assert info == KeyInfo(key_id="admin", name="admin", admin=True)
    assert await meter.authenticate(key_digest("sk-ms-wrong")) == b""

    request = AdmissionRequest("cmpl-1", info.key_id, "tiny", ["the mill", [1, 2]], max_tokens=4, choices=1)
    [answer] = unpack_admissions(await meter.admit(pack([request])))
    assert isinstance(answer, Admitted)
    assert answer.token_ids[1] == [1, 2]

    row = Settlement(
        request_id="cmpl-1",
        key_id=info.key_id,
        model="tiny",
        status="finished",
        prompt_tokens=4,
        cached_tokens=0,
        completion_tokens=8,
        choices=2,
        resumes=0,
        started_at=time.time(),
        first_token_s=0.1,
        total_s=0.2,
    )
    await meter.settle(pack([row]))
    await meter.settle(pack([row]))
    await stop(meter)

    with pytest.raises(MeterClosed):
        await meter.check_health()
    ledger = Ledger(f"sqlite:///{home}/ledger.db")
    assert await ledger.totals() == (1, 4, 0, 8)
    await ledger.close()


async def test_without_required_keys_no_key_is_made_and_everyone_is_anonymous(tmp_path: Path) -> None:
    meter = deploy(tmp_path, require_keys=False)
    info = unpack(await meter.authenticate(b"anything"), KeyInfo)
    assert info == KeyInfo(key_id="anonymous", name="anonymous", admin=False)
    assert not (tmp_path / "admin.key").exists()
    await stop(meter)


async def test_the_garbage_collector_finds_nothing_left_to_close(tmp_path: Path) -> None:
    meter = deploy(tmp_path)
    await stop(meter)
    assert meter.__del__() is None
    del meter
    gc.collect()  # an abandoned coroutine would be a warning, and so an error


async def test_an_unsafe_key_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_text("sk-ms-known-to-all")
    (tmp_path / "admin.key").chmod(0o644)
    with pytest.raises(AdminKeyError, match="chmod 600"):
        deploy(tmp_path)
    gc.collect()
