from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from deployments.meter.errors import AdminKeyError
from deployments.meter.keys.keys import ADMIN_KEY_VARIABLE, ensure_admin_key, key_digest, new_key

ROUNDS = 20


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)


def test_the_first_start_makes_a_key_that_later_starts_find(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    key = ensure_admin_key(home)
    assert re.fullmatch(r"sk-ms-[A-Za-z0-9_-]{43}", key)
    assert ensure_admin_key(home) == key
    assert (home / "admin.key").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert os.listdir(home) == ["admin.key"]


def _ensure_in_rounds(parent: Path, barrier: Barrier, answers: multiprocessing.SimpleQueue[list[str]]) -> None:
    keys = []
    for number in range(ROUNDS):
        barrier.wait(timeout=20)
        keys.append(ensure_admin_key(parent / str(number)))
    answers.put(keys)


def test_processes_that_start_together_get_the_same_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.SimpleQueue()
    processes = [context.Process(target=_ensure_in_rounds, args=(tmp_path, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = answers.get(), answers.get()
    for process in processes:
        process.join()
    answers.close()
    assert first == second
    assert len(set(first)) == ROUNDS
    assert {name for home in tmp_path.iterdir() for name in os.listdir(home)} == {"admin.key"}


def test_a_failure_while_making_the_key_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_descriptor: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="no space"):
            ensure_admin_key(tmp_path)
    assert os.listdir(tmp_path) == []
    assert ensure_admin_key(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    ensure_admin_key(tmp_path)
    (tmp_path / "admin.key").chmod(mode)
    with pytest.raises(AdminKeyError, match=rf"{mode:04o}.*chmod 600 .*admin\.key"):
        ensure_admin_key(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", "two words", "kéy"])
def test_a_key_that_no_client_could_send_is_refused(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "admin.key").touch(mode=0o600)
    (tmp_path / "admin.key").write_text(content, encoding="utf-8")
    with pytest.raises(AdminKeyError, match=r"admin\.key"):
        ensure_admin_key(tmp_path)
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, content)
    with pytest.raises(AdminKeyError, match=ADMIN_KEY_VARIABLE):
        ensure_admin_key(tmp_path)


def test_the_environment_overrides_the_file_and_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "from-a-secret\n")
    assert ensure_admin_key(tmp_path) == "from-a-secret"
    assert os.listdir(tmp_path) == []


def test_keys_are_known_by_their_sha_256_only() -> None:
    key = new_key()
    assert re.fullmatch(r"sk-ms-[A-Za-z0-9_-]{43}", key)
    assert new_key() != key
    assert key_digest(key) == hashlib.sha256(key.encode()).digest()
