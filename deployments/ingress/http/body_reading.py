"""Reads the bodies of requests, bounded, and unpacks them."""

from __future__ import annotations

import zlib

from anyio.to_thread import run_sync
from starlette.requests import Request

from deployments.ingress.errors import BodyTooLarge, InvalidRequest, UnsupportedEncoding, UnsupportedMediaType

__all__ = ["read_body"]


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body, read and unpacked no further than the limit. Raises UnsupportedMediaType, BodyTooLarge, InvalidRequest,
    RequestTimeout."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaType(
            f"Content-Type is '{content_type or 'missing'}'; expected 'application/json'. With curl, add "
            "-H 'Content-Type: application/json'."
        )
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", *_GZIP):
        raise UnsupportedEncoding(
            f"Content-Encoding is '{encoding[:100]}'; expected 'gzip', or none: send the body as it is."
        )
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes.")
        chunks.append(chunk)
    body = b"".join(chunks)
    # On a thread: a body at the limit takes tens of milliseconds.
    return await run_sync(_gunzipped, body, limit_bytes) if encoding in _GZIP else body


_GZIP = ("gzip", "x-gzip")
_MAX_MEMBERS = 8


def _gunzipped(body: bytes, limit_bytes: int) -> bytes:
    """Unpacked no further than the limit, whatever is packed. Raises InvalidRequest, BodyTooLarge."""
    unpacked = bytearray()
    members = 0
    while body:
        members += 1
        if members > _MAX_MEMBERS:  # each copies what is behind it
            raise InvalidRequest(f"The body has more than {_MAX_MEMBERS} pieces that gzip made. Pack it in one.")
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        try:
            unpacked += member.decompress(body, limit_bytes + 1 - len(unpacked))
        except zlib.error:
            raise InvalidRequest("The body is not what gzip makes, which Content-Encoding says.") from None
        if len(unpacked) > limit_bytes:
            raise BodyTooLarge(f"The body is larger than the limit of {limit_bytes} bytes, once it is unpacked.")
        if not member.eof:
            raise InvalidRequest("The body ends before what gzip has packed does.")
        body = member.unused_data
    return bytes(unpacked)
