"""Catalog: models come and go with the applications, and what is served stays served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.ingress.errors import ModelNotFound
from deployments.ingress.routing.catalog import Catalog, CatalogEntry, FillInTheMiddle
from deployments.ingress.routing.engine_pool import EnginePool
from deployments.ingress.routing.replica_stream import SILENCE_LIMIT_S
from tests.deployments.accounts import RecordedOutbox
from tests.deployments.ingress.letter_tokenizer import save_letter_tokenizer
from tests.deployments.ingress.memory_replicas import LIMITS, ScriptedReplica
from tests.deployments.ingress.virtual_time import in_virtual_time, quiet, write_scheduler


class Serve:
    """What the catalog sees of Ray Serve."""

    def __init__(self, *applications: str) -> None:
        self.applications = frozenset(applications)
        self.error: Exception | None = None
        self.pools: dict[str, list[EnginePool]] = {}
        self.replica = ScriptedReplica()

    async def existing(self, applications: Iterable[str]) -> frozenset[str]:
        if self.error is not None:
            raise self.error
        return self.applications & frozenset(applications)

    async def open_pool(self, entry: CatalogEntry) -> EnginePool:
        pool = EnginePool(
            entry.name,
            lambda _replica: self.replica,
            ingress_id="i",
            limits=entry.limits,
            writes=write_scheduler(),
            checkpoint=RecordedOutbox().checkpoint,
        )
        pool.replicas_changed(frozenset({"r0"}))
        self.pools.setdefault(entry.name, []).append(pool)
        return pool


@asynccontextmanager
async def following(serve: Serve) -> AsyncIterator[Catalog]:
    catalog = Catalog(serve.existing, serve.open_pool)
    await catalog.start()
    try:
        yield catalog
    finally:
        await catalog.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_letter_tokenizer(tmp_path / "model")


def entry(name: str, folder: Path, *, max_model_len: int = 64) -> CatalogEntry:
    return CatalogEntry(
        name=name,
        application=f"model-{name}",
        folder=folder,
        max_model_len=max_model_len,
        fingerprint="fp_1",
        limits=LIMITS,
    )


def served(catalog: Catalog) -> list[str]:
    return [model.entry.name for model in catalog.models()]


@in_virtual_time
async def test_a_model_is_served_while_it_is_listed_and_its_application_exists(folder: Path) -> None:
    serve = Serve("gateway", "model-a", "model-c")
    async with following(serve) as catalog:
        assert not catalog.known
        await catalog.replace([entry("b", folder), entry("a", folder)])
        assert catalog.known
        assert served(catalog) == ["a"]

        serve.applications |= {"model-b"}
        await asyncio.sleep(1.1)
        assert served(catalog) == ["a", "b"]
        assert catalog.find("b").tokenizer.encode("ab").ids == [2, 3]

        serve.applications -= {"model-a"}
        await asyncio.sleep(1.1)
        assert served(catalog) == ["b"]
        with pytest.raises(ModelNotFound) as unknown:
            catalog.find("a")
        assert unknown.value.param == "model"

        await catalog.replace([])
        assert served(catalog) == []


@in_virtual_time
async def test_streams_of_a_removed_model_are_closed_and_it_gets_new_ones_when_it_returns(folder: Path) -> None:
    serve = Serve("model-a")
    async with following(serve) as catalog:
        await catalog.replace([entry("a", folder)])
        await quiet()
        serve.applications = frozenset()
        await asyncio.sleep(1.1)
        [pool] = serve.pools["a"]
        assert pool.cards() == []
        serve.applications = frozenset({"model-a"})
        await asyncio.sleep(1.1)
        assert len(serve.pools["a"]) == 2
        assert catalog.find("a").pool.ready


@in_virtual_time
async def test_a_changed_model_keeps_its_pool_and_its_age(folder: Path) -> None:
    serve = Serve("model-a")
    async with following(serve) as catalog:
        await catalog.replace([entry("a", folder)])
        before = catalog.find("a")
        limits = replace(LIMITS, hold_timeout_s=1.0)
        changed = entry("a", folder, max_model_len=32).model_copy(update={"limits": limits})
        await catalog.replace([changed])
        after = catalog.find("a")
        assert after.entry == changed
        assert (after.pool, after.created) == (before.pool, before.created)
        assert after.pool.limits == limits
        assert len(serve.pools["a"]) == 1


@in_virtual_time
async def test_nothing_happens_to_models_that_stay_as_they_are(folder: Path) -> None:
    serve = Serve("model-a", "model-b")
    async with following(serve) as catalog:
        await catalog.replace([entry("a", folder)])
        before = catalog.find("a")
        await catalog.replace([entry("a", folder), entry("b", folder)])
        await asyncio.sleep(5)
        assert catalog.find("a") is before


@in_virtual_time
async def test_the_texts_of_tokens_are_kept_as_long_as_the_model_stays_as_it_is(folder: Path) -> None:
    serve = Serve("model-a")
    async with following(serve) as catalog:
        await catalog.replace([entry("a", folder)])
        texts = catalog.find("a").token_texts
        assert texts.alone(2) == "a"
        assert catalog.find("a").token_texts is texts
        await catalog.replace([entry("a", folder).model_copy(update={"fingerprint": "fp_2"})])  # other files, maybe
        assert catalog.find("a").token_texts is not texts
        assert catalog.find("a").token_texts.alone(2) == "a"


@in_virtual_time
async def test_models_of_one_folder_share_a_tokenizer_until_its_file_is_written_anew(folder: Path) -> None:
    async with following(Serve("model-a", "model-b", "model-c")) as catalog:
        await catalog.replace([entry("a", folder), entry("b", folder)])
        first = catalog.find("a").tokenizer
        assert catalog.find("b").tokenizer is first

        await catalog.replace([entry("a", folder, max_model_len=32), entry("b", folder)])
        assert catalog.find("a").tokenizer is first

        file = folder / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
        await catalog.replace([entry("a", folder), entry("b", folder), entry("c", folder)])
        assert catalog.find("a").tokenizer is catalog.find("c").tokenizer is not first
        assert catalog.find("b").tokenizer is first


def test_a_gap_is_put_to_the_model_as_prefix_suffix_and_middle() -> None:
    infilling = FillInTheMiddle(prefix="<PRE>", suffix="<SUF>", middle="<MID>")
    assert infilling.prompt("def f(", "): pass") == "<PRE>def f(<SUF>): pass<MID>"


@in_virtual_time
async def test_while_the_applications_cannot_be_listed_what_is_served_stays(folder: Path) -> None:
    serve = Serve("model-a")
    async with following(serve) as catalog:
        await catalog.replace([entry("a", folder)])
        serve.error = RuntimeError("no controller")
        await asyncio.sleep(30)
        assert served(catalog) == ["a"]
        serve.error = None
        serve.applications = frozenset()
        await asyncio.sleep(1.1)
        assert served(catalog) == []


@in_virtual_time
async def test_a_model_whose_files_are_broken_keeps_no_other_from_being_served(folder: Path, tmp_path: Path) -> None:
    serve = Serve("model-a", "model-b")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    async with following(serve) as catalog:
        await catalog.replace([entry("a", broken), entry("b", folder)])
        assert served(catalog) == ["b"]
        (broken / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        await asyncio.sleep(1.1)
        assert served(catalog) == ["a", "b"]


@in_virtual_time
async def test_replicas_that_fall_silent_are_given_up(folder: Path) -> None:
    serve = Serve("model-a")
    async with following(serve) as catalog:
        await catalog.replace([entry("a", folder)])
        await quiet()
        pool = catalog.find("a").pool
        assert pool.ready
        serve.replica.greeting = False
        await asyncio.sleep(SILENCE_LIMIT_S - 0.1)
        assert pool.ready
        await asyncio.sleep(0.5)
        assert not pool.ready


@in_virtual_time
async def test_close_is_safe_before_start_and_twice() -> None:
    catalog = Catalog(Serve().existing, Serve().open_pool)
    await catalog.close()
    await catalog.start()
    await catalog.close()
    await catalog.close()
    assert catalog.models() == []


@in_virtual_time
async def test_a_pool_that_cannot_be_looked_at_does_not_end_the_watch_over_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = Serve("model-a", "model-b")
    looked: list[str] = []

    def check_silence(pool: EnginePool, _now: float) -> None:
        looked.append(pool.model)
        if pool.model == "a":
            raise RuntimeError("broken")

    monkeypatch.setattr(EnginePool, "check_silence", check_silence)
    async with following(serve) as catalog:
        await catalog.replace([entry("a", folder), entry("b", folder)])
        await asyncio.sleep(5)
        assert looked.count("b") > 10


@in_virtual_time
async def test_what_is_kept_for_a_model_is_let_go_when_it_is_listed_no_more(folder: Path) -> None:
    serve = Serve("model-a", "model-b")
    kept: list[frozenset[str]] = []

    async def forget_others(applications: frozenset[str]) -> None:
        kept.append(applications)

    catalog = Catalog(serve.existing, serve.open_pool, forget_others)
    await catalog.start()
    try:
        await catalog.replace([entry("a", folder), entry("b", folder)])
        assert kept[-1] == {"model-a", "model-b"}
        await catalog.replace([entry("b", folder)])
        await asyncio.sleep(10)
        assert kept[-1] == {"model-b"}
    finally:
        await catalog.close()
