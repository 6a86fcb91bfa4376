"""docs/api.md is what the models say."""

from __future__ import annotations

from pathlib import Path

from deployments.ingress.api.completions.dialects import DIALECTS
from deployments.ingress.api.completions.request import CompletionRequest
from deployments.ingress.api.description.operations import error_classes
from deployments.ingress.api.parameter_types import Source
from deployments.ingress.openapi.markdown import api_reference

DOCS = Path(__file__).parents[4] / "docs" / "api.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCS.read_text() == api_reference(), (
        "make it anew: .venv/bin/python -m deployments.ingress.openapi.markdown > docs/api.md"
    )


def test_every_parameter_has_a_row_with_its_source() -> None:
    rows = [[cell.strip() for cell in line.split(" | ")] for line in api_reference().splitlines()]
    told = {(row[0].removeprefix("| "), row[3].removesuffix(" |")) for row in rows if len(row) > 3}
    for name, field in CompletionRequest.model_fields.items():
        [source] = [each.name for each in field.metadata if isinstance(each, Source)]
        assert (f"`{name}`", source) in told


def test_every_dialect_and_every_error_is_there() -> None:
    text = api_reference()
    for dialect in DIALECTS:
        assert f"`POST {dialect.path}`" in text
    for kind in error_classes():
        assert f"| {kind.status}" in text
        assert kind.code is None or f"`{kind.code}`" in text


def test_lines_of_prose_are_short() -> None:
    assert [line for line in api_reference().splitlines() if len(line) > 120 and not line.startswith("|")] == []
