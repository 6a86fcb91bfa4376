"""What the tests of texts have in common."""

from __future__ import annotations

import os

import pytest
from tokenizers import Tokenizer

from serve_app.config import millstream_home


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Tokenizer:
    """Of SmolLM2, where it has been prepared."""
    home = millstream_home(os.environ)
    prepared = sorted(home.glob("models/*smollm2*/tokenizer.json"))
    if not prepared:
        pytest.skip(f"no prepared SmolLM2 under {home}")
    return Tokenizer.from_file(str(prepared[0]))
