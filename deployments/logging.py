"""Structured logs: one JSON object a line, with the request id bound where there is one. Never prompts or texts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler

import structlog

__all__ = ["configure_logging", "log_targets_kept"]


def configure_logging(level: int = logging.INFO) -> None:
    """For a replica's process: the lines go into the replica's log file of Ray Serve, which adds time and level."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: logging.getLogger("ray.serve"),
        cache_logger_on_first_use=True,
    )


@contextmanager
def log_targets_kept() -> Iterator[None]:
    """Around what calls logging.config.dictConfig, as the import of vLLM does. That closes all handlers of the process,
    and a closed MemoryHandler, such as Ray Serve's, has forgotten where it writes to: nothing would be logged again."""
    kept = [
        (handler, handler.target)
        for handler in logging.getLogger("ray.serve").handlers
        if isinstance(handler, MemoryHandler)
    ]
    try:
        yield
    finally:
        for handler, target in kept:
            handler.setTarget(target)
