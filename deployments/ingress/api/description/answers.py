"""What endpoints have in common when they describe their answers: models that build nothing, from which the OpenAPI
document is made. tests/deployments/ingress/openapi/test_openapi.py holds answers against them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Answer", "Count", "Error", "HTTPValidationError"]


class Answer(BaseModel):
    """A field with a default may be absent."""

    model_config = ConfigDict(use_attribute_docstrings=True)


Count = Annotated[int, Field(ge=0)]


class ErrorBody(Answer):
    message: str
    """What is wrong and what to do."""
    type: str
    param: str | None
    """The parameter that is wrong."""
    code: str | None


class Error(Answer):
    """OpenAI's shape."""

    error: ErrorBody


class ValidationError(Answer):
    loc: list[str | int]
    """`body`, and the path of the parameter in it."""
    msg: str
    """What is wrong and what to do."""
    type: str
    """The mistake in a word."""


class HTTPValidationError(Answer):
    detail: list[ValidationError]
