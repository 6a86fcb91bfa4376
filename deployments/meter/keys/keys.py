"""What a key is, and where the admin key comes from. All others are in the database (key_store.py)."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from deployments.meter.errors import AdminKeyError

__all__ = ["ADMIN_KEY_VARIABLE", "ensure_admin_key", "key_digest", "new_key"]

ADMIN_KEY_VARIABLE: Final = "MILLSTREAM_ADMIN_KEY"
"""Overrides the file. On Kubernetes it comes from a Secret: volumes with an fsGroup open files to the group."""


def new_key() -> str:
    """A key that nobody has: 256 random bits."""
    return f"sk-ms-{secrets.token_urlsafe(32)}"


def key_digest(key: str) -> bytes:
    """SHA-256 of a key, 32 bytes: what is stored, sent and compared."""
    return hashlib.sha256(key.encode()).digest()


def ensure_admin_key(home: Path) -> str:
    """The admin key: MILLSTREAM_ADMIN_KEY if set, else what `home/admin.key` holds, which is made if missing.

    Processes that start at the same time get the same key, and a crash leaves the whole file or none.
    Raises AdminKeyError when others than the owner may touch the file, or for a key that no client could
    send; OSError when `home` cannot be written or has no hard links.
    """
    if (from_environment := os.environ.get(ADMIN_KEY_VARIABLE)) is not None:
        return _usable(from_environment, ADMIN_KEY_VARIABLE)
    path = home / "admin.key"
    if not path.exists():
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create_key_file(path)
    return _read_key_file(path)


def _create_key_file(path: Path) -> None:
    """Makes `path` with a new key, unless another process is first."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(f"{new_key()}\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link never replaces the key that another process made meanwhile.
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_key_file(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise AdminKeyError(f"{path}: mode is {mode:04o}, expected 0600; run: chmod 600 {path}")
        return _usable(file.read(), str(path))


def _usable(key: str, source: str) -> str:
    key = key.strip()
    if not key or not all("!" <= character <= "~" for character in key):
        raise AdminKeyError(f"{source}: expected a key of printable ASCII characters without spaces")
    return key
