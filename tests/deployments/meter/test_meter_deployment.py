"""MeterDeployment as Serve drives it, without Serve, and called as by an ingress."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from deployments.contracts import (
    AdministrationAnswer,
    AdmissionRequest,
    Admitted,
    CreateKey,
    KeyDraft,
    KeyInfo,
    MeterCounters,
    UsageQuery,
    UsageRow,
    pack,
    unpack,
    unpack_admission,
)
from deployments.meter import deployment
from deployments.meter.deployment import MeterDeployment
from deployments.meter.errors import AdminKeyError, MeterClosed
from deployments.meter.keys.keys import ADMIN_KEY_VARIABLE, key_digest
from deployments.meter.remote.meter_transport import MeterUnreachable
from deployments.meter.remote.remote_meter import RemoteMeter
from tests.deployments.meter.running_meter import settlement
from tests.deployments.meter.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(autouse=True)
def no_traces_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)
    monkeypatch.setattr(deployment, "configure_logging", lambda: None)  # is of a whole process
    monkeypatch.setattr(deployment, "get_node_ip_address", lambda: "127.0.0.1")  # Ray's, without Ray


def deploy(home: Path, *, require_keys: bool = True, **more: Any) -> MeterDeployment:
    return MeterDeployment(str(home), f"sqlite:///{home}/ledger.db", require_keys, **more)


async def configure(meter: MeterDeployment, folder: Path) -> None:
    described = {
        "name": "tiny",
        "folder": str(folder),
        "max_model_len": 64,
        "prompt_price": 1e6,
        "completion_price": 2e6,
    }
    await meter.reconfigure({"models": [described]})


async def stop(meter: MeterDeployment) -> None:
    """As Serve's replica does."""
    closing = meter.__del__()
    assert closing is not None
    await closing


class Handle:
    """What Serve's handle of a meter is to its callers."""

    def __init__(self, meter: MeterDeployment) -> None:
        self.connect = self
        self._meter = meter

    def options(self, **_options: Any) -> Handle:
        return self

    async def remote(self) -> bytes:
        return await self._meter.connect()


@contextmanager
def called(meter: MeterDeployment) -> Iterator[RemoteMeter]:
    remote = RemoteMeter(cast(Any, Handle(meter)))
    try:
        yield remote
    finally:
        remote.close()


async def usage(meter: RemoteMeter) -> list[UsageRow]:
    return unpack(await meter.usage(pack(UsageQuery(since=0.0, by=("key",)))), list[UsageRow])


async def test_one_request_from_its_key_to_its_row(tmp_path: Path) -> None:
    home = tmp_path / "home"
    deployed = deploy(home)
    await configure(deployed, save_tiny_tokenizer(tmp_path / "tiny"))
    with called(deployed) as meter:
        await meter.ping()
        await deployed.check_health()

        admin_key = (home / "admin.key").read_text().strip()
        assert unpack(await meter.authenticate(key_digest(admin_key)), KeyInfo) == KeyInfo("admin", "admin", admin=True)
        assert await meter.authenticate(key_digest("sk-ms-wrong")) == b""

        made = unpack(await meter.administer(pack(CreateKey(KeyDraft("ci", team="mill")))), AdministrationAnswer)
        assert made.secret is not None
        info = unpack(await meter.authenticate(key_digest(made.secret)), KeyInfo)
        assert info == KeyInfo(made.keys[0].id, "ci", admin=False, team="mill")

        request = AdmissionRequest(
            "cmpl-1", info.key_id, "tiny", ["the mill", [1, 2]], 4, 1, team="mill", ingress_id="i-1"
        )
        answer = unpack_admission(await meter.admit(pack(request)))
        assert isinstance(answer, Admitted)
        assert answer.token_ids[1] == [1, 2]
        assert abs(answer.admitted_at - time.time()) < 60.0
        await meter.renew("i-1")

        row = settlement(request, answer, completion_tokens=8)
        await meter.settle(pack([row]))
        await meter.settle(pack([row]))
        prompt_tokens = sum(map(len, answer.token_ids))
        [used] = await usage(meter)
        assert used == UsageRow(1, prompt_tokens, 0, 8, prompt_tokens + 16.0, key=info.key_id)
        counted = unpack(await meter.counters(), MeterCounters)
        assert [(each.team, each.requests, each.completion_tokens) for each in counted.requests] == [("mill", 1, 8)]
        assert (counted.wrong_keys, counted.open_reservations, counted.admissions.count) == (1, 0, 1)
        await stop(deployed)
        with pytest.raises(MeterClosed):
            await deployed.check_health()
        with pytest.raises(MeterUnreachable):
            await meter.settle(pack([row]))


async def test_a_change_of_models_keeps_what_is_reserved(tmp_path: Path) -> None:
    deployed = deploy(tmp_path)
    await configure(deployed, save_tiny_tokenizer(tmp_path / "tiny"))
    with called(deployed) as meter:
        await meter.admit(pack(AdmissionRequest("cmpl-1", "admin", "tiny", [[1]], 4, 1)))
        await deployed.reconfigure({"models": []})
        assert unpack(await meter.counters(), MeterCounters).open_reservations == 1
    await stop(deployed)


async def test_without_required_keys_everyone_but_the_administrator_is_anonymous(tmp_path: Path) -> None:
    deployed = deploy(tmp_path, require_keys=False)
    await configure(deployed, tmp_path)
    with called(deployed) as meter:
        info = unpack(await meter.authenticate(b"anything"), KeyInfo)
        assert info == KeyInfo(key_id="anonymous", name="anonymous", admin=False)
        administrator = key_digest((tmp_path / "admin.key").read_text().strip())
        assert unpack(await meter.authenticate(administrator), KeyInfo).admin
    await stop(deployed)


async def test_a_successor_waits_until_its_predecessor_has_let_go(tmp_path: Path) -> None:
    """Two processes that decide on the same limits would admit twice as much."""
    folder = save_tiny_tokenizer(tmp_path / "tiny")
    first, second, other = deploy(tmp_path), deploy(tmp_path), deploy(tmp_path, shard=1, shards=2)
    await configure(first, folder)
    await configure(other, folder)
    with called(first) as meter:
        await meter.admit(pack(AdmissionRequest("cmpl-1", "admin", "tiny", [[1]], 4, 1)))
    starting = asyncio.create_task(configure(second, folder))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(starting), 0.3)
    with pytest.raises(MeterClosed):
        await second.connect()
    await second.check_health()
    await stop(first)
    await starting
    with called(second) as meter:
        assert unpack(await meter.counters(), MeterCounters).open_reservations == 1
    await stop(second)
    await stop(other)


async def test_the_first_meter_takes_what_meters_that_are_no_more_have_left(tmp_path: Path) -> None:
    folder = save_tiny_tokenizer(tmp_path / "tiny")
    gone = MeterDeployment(str(tmp_path), f"sqlite:///{tmp_path}/away/ledger.db", True, shard=1, shards=2)
    await configure(gone, folder)
    request = AdmissionRequest("cmpl-1", "admin", "tiny", [[1]], 4, 1)
    with called(gone) as meter:
        for each in (request, AdmissionRequest("cmpl-2", "admin", "tiny", [[1]], 4, 1)):
            await meter.admit(pack(each))
        await meter.settle(pack([settlement(request)]))
        assert unpack(await meter.counters(), MeterCounters).spooled == 1
    await stop(gone)

    deployed = deploy(tmp_path)
    await configure(deployed, folder)
    with called(deployed) as meter:
        assert unpack(await meter.counters(), MeterCounters).open_reservations == 1
        async with asyncio.timeout(10):
            while not await usage(meter):  # noqa: ASYNC110  # the ledger takes them from the disk by itself
                await asyncio.sleep(0.01)
    await stop(deployed)


async def test_the_garbage_collector_finds_nothing_left_to_close(tmp_path: Path) -> None:
    meter = deploy(tmp_path)
    await configure(meter, tmp_path)
    await stop(meter)
    assert meter.__del__() is None
    del meter
    deploy(tmp_path)  # never configured, and so never opened
    gc.collect()  # an abandoned coroutine would be a warning, and so an error


async def test_an_unsafe_key_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_text("sk-ms-known-to-all")
    (tmp_path / "admin.key").chmod(0o644)
    with pytest.raises(AdminKeyError, match="chmod 600"):
        deploy(tmp_path)
    gc.collect()
