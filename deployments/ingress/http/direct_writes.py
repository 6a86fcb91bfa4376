"""The connection under an answer: chunks written past the layers that an ASGI `send` goes through, and a reset.

Between uvicorn and a response lie Starlette's middleware, Millstream's and Ray Serve's: each adds a coroutine to every
`send`, and none of them has anything to do with the chunks between the first and the last. All that touches the insides
of uvicorn and Serve for that is here; behind any other server there is no `Connection`, and all goes through `send`.
"""

from __future__ import annotations

import socket
import struct
from types import FunctionType
from typing import Any

from starlette.types import Send
from uvicorn.protocols.http.h11_impl import RequestResponseCycle as H11Cycle
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle as HttptoolsCycle

__all__ = ["CONNECTION", "Connection"]

CONNECTION = "millstream.connection"
"""Where it is among a scope's extensions."""

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of zero seconds: closing drops what the kernel has not delivered, and tells the peer so."""


class Connection:
    """Of one request on uvicorn, for writing between the start and the end of its answer."""

    def __init__(self, cycle: HttptoolsCycle | H11Cycle) -> None:
        self._cycle = cycle

    @classmethod
    def behind(cls, send: Send) -> Connection | None:
        """The connection that `send` writes to: of Serve's layers each is a closure over the next one's `send`."""
        layer: Any = send
        while isinstance(layer, FunctionType):
            names = layer.__code__.co_freevars
            if "send" not in names or layer.__closure__ is None:
                return None
            layer = layer.__closure__[names.index("send")].cell_contents
        cycle = getattr(layer, "__self__", None)
        return cls(cycle) if isinstance(cycle, HttptoolsCycle | H11Cycle) else None

    def write(self, chunk: bytes) -> bool:
        """Part of a body whose answer has been started. False if it was not written: then `send` it, which waits until
        the client has read on."""
        cycle = self._cycle
        if not isinstance(cycle, HttptoolsCycle) or not cycle.chunked_encoding or cycle.response_complete:
            return False
        if cycle.disconnected or cycle.flow.write_paused:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        return True

    def end_body_by_closing(self) -> bool:
        """For a client of HTTP/1.0, which knows no chunks, before the answer is started. uvicorn's parser for it, h11,
        does so itself; httptools writes chunks to all. False where nothing needs to be done."""
        if not isinstance(self._cycle, HttptoolsCycle):
            return False
        self._cycle.chunked_encoding = False
        return True

    def expect(self, size_bytes: int) -> None:
        """Of a body that is ended by closing: so much is sent next. uvicorn holds each `send` to a length."""
        if isinstance(self._cycle, HttptoolsCycle):
            self._cycle.expected_content_length = size_bytes

    def reset(self) -> None:
        """Drop the connection with what is buffered for it, which its client does not read.

        ASGI has no word for that. When an app ends in the middle of an answer, uvicorn closes its transport, which
        first delivers what is buffered: to a client that does not read, never.
        """
        transport = self._cycle.transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        transport.abort()
