"""Structured logs: one JSON object a line, with the request id bound where there is one. Never prompts or texts."""

from __future__ import annotations

import logging

import structlog

__all__ = ["configure_logging"]


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
