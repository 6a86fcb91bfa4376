"""An authority and certificates of it, as environments of processes (deployments/connections/tls.py)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

__all__ = ["Authority", "variables"]


class Authority:
    """Writes what it issues below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()

    def issue(self, name: str, *addresses: str, expired: bool = False) -> Path:
        """A folder with what a Secret of cert-manager has, for these addresses: ca.crt, tls.crt and tls.key."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        until = datetime.now(UTC) + timedelta(days=-1 if expired else 1)
        issued = self._authority.issue_cert(*addresses, not_after=until)
        self._authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        issued.private_key_pem.write_to_path(str(folder / "tls.key"))
        (folder / "tls.crt").write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        return folder

    def environment(self, name: str = "local", address: str = "127.0.0.1", *, expired: bool = False) -> dict[str, str]:
        """Of a process at `address`."""
        return variables(self.issue(name, address, expired=expired))


def variables(folder: Path) -> dict[str, str]:
    """That turn TLS on, with the files of `folder`."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "tls.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "tls.key"),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
    }
