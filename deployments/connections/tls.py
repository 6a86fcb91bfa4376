"""TLS between the cluster's processes: one switch and one set of files, those that Ray reads for its own connections.

With RAY_USE_TLS=1 Ray's gRPC (GCS, raylets, workers, calls through Serve) is encrypted and wants a client certificate;
the same variable and files turn it on for ticketed_connection.py. Both ends show a certificate of the authority in
RAY_TLS_CA_CERT, and the one that is connected to must be for the address that was asked for, as Ray itself demands.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

__all__ = ["TlsError", "TlsFiles", "tls_files"]

log = structlog.get_logger()

_SWITCH: Final = "RAY_USE_TLS"
_CERTIFICATE, _KEY, _AUTHORITY = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"

# Codes of OpenSSL (X509_V_ERR_*), which `ssl` has no names for.
_NOT_YET_VALID, _EXPIRED, _OTHER_ADDRESS = 9, 10, (62, 64)
_OTHER_AUTHORITY: Final = (18, 19, 20, 21)

_NO_REFUSAL: Final = (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLZeroReturnError, ssl.SSLEOFError)
"""More must come first, or the other end has closed."""


class TlsError(OSError):
    """TLS is asked for and cannot be had; the text says why and what to do."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of this process, which both its servers and its clients show and check."""

    certificate: Path
    key: Path
    authority: Path

    def server_context(self) -> ssl.SSLContext:
        """Raises TlsError."""
        context = self._loaded(ssl.PROTOCOL_TLS_SERVER)
        context.sslobject_class = _Connection
        return context

    def client_context(self) -> ssl.SSLContext:
        """Raises TlsError."""
        context = self._loaded(ssl.PROTOCOL_TLS_CLIENT)
        context.sslobject_class = _Connection
        return context

    def check(self, address: str) -> None:
        """Raises TlsError unless a process with these files can connect to another with the same at `address`."""
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = self._loaded(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(to_client, to_server, server_hostname=address)
        server = self._loaded(ssl.PROTOCOL_TLS_SERVER).wrap_bio(to_server, to_client, server_side=True)
        try:
            for end in (client, server, client, server):
                with suppress(ssl.SSLWantReadError):  # the other's turn
                    end.do_handshake()
        except ssl.SSLError as error:
            raise TlsError(
                f"{_CERTIFICATE}={self.certificate} cannot be used at {address}: {_advice(error)}"
            ) from error

    def _loaded(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:
            raise TlsError(
                f"{_CERTIFICATE}={self.certificate} and {_KEY}={self.key}: {_reason(error)}. Expected PEM files of a "
                "certificate and its key that this user can read"
            ) from error
        try:
            context.load_verify_locations(self.authority)
        except OSError as error:
            raise TlsError(
                f"{_AUTHORITY}={self.authority}: {_reason(error)}. Expected a PEM file of the authority's certificate "
                "that this user can read"
            ) from error
        return context


class _Connection(ssl.SSLObject):
    """Says why it is refused, which event loops do not."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLError as error:
            _tell(error)
            raise

    def read(self, *arguments: Any) -> Any:
        try:
            return super().read(*arguments)
        except ssl.SSLError as error:  # a server's refusal comes after the client's part of the handshake
            _tell(error)
            raise


def _tell(error: ssl.SSLError) -> None:
    if not isinstance(error, _NO_REFUSAL):
        log.warning("connection refused", reason=_advice(error))


def tls_files(environ: Mapping[str, str]) -> TlsFiles | None:
    """None without TLS. Raises TlsError when a file is not named."""
    if environ.get(_SWITCH, "0").lower() not in ("1", "true"):  # as Ray reads it
        return None
    names = (_CERTIFICATE, _KEY, _AUTHORITY)
    for name in names:
        if not Path(environ.get(name, "")).is_absolute():
            raise TlsError(
                f"{_SWITCH} is set, so {name} must be the absolute path of a PEM file, got "
                f"{environ.get(name) or 'nothing'!r}"
            )
    return TlsFiles(*(Path(environ[name]) for name in names))


def _advice(error: ssl.SSLError) -> str:
    """Why two processes do not connect, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message.rstrip(".")
        if error.verify_code == _EXPIRED:
            return f"{said}. Renew it, then replace the pods, or restart the processes, that still show the old one"
        if error.verify_code == _NOT_YET_VALID:
            return f"{said}. Set the clocks of the machines right"
        if error.verify_code in _OTHER_ADDRESS:
            return f"{said}. The certificate's subject alternative names must have that address"
        if error.verify_code in _OTHER_AUTHORITY:
            return f"{said}. The certificate is not of the authority in {_AUTHORITY}: use one authority in all pods"
        return said
    return (
        f"{_reason(error)}. All processes need {_SWITCH}=1 and a certificate of the same authority: one without TLS, "
        "or without a certificate, is refused"
    )


def _reason(error: OSError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return reason.lower().replace("_", " ") if reason else str(error)
