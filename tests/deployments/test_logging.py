"""Logs of a replica's process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from io import StringIO
from logging.config import dictConfig
from logging.handlers import MemoryHandler

import pytest

from deployments.logging import log_targets_kept


@pytest.fixture
def written() -> Iterator[StringIO]:
    """What Ray Serve's logger writes, through a buffer as in a replica."""
    text = StringIO()
    logger = logging.getLogger("ray.serve")
    handlers, logger.handlers = logger.handlers, [MemoryHandler(1, target=logging.StreamHandler(text))]
    level = logger.level
    logger.setLevel(logging.INFO)
    yield text
    logger.handlers[0].close()
    logger.handlers = handlers
    logger.setLevel(level)


def configure_as_vllm_does() -> None:
    dictConfig({"version": 1, "disable_existing_loggers": False})


def test_logs_go_on_after_vllm_has_configured_its_own(written: StringIO) -> None:
    with log_targets_kept():
        configure_as_vllm_does()
    logging.getLogger("ray.serve").info("still here")
    assert written.getvalue() == "still here\n"


def test_without_it_they_would_not(written: StringIO) -> None:
    """If this fails, Python or vLLM has become kinder, and log_targets_kept is dead."""
    configure_as_vllm_does()
    logging.getLogger("ray.serve").info("gone")
    assert written.getvalue() == ""
