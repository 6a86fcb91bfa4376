"""All endpoints, in the order of the documents: one more is one line here."""

from __future__ import annotations

from typing import Final

from deployments.ingress.api.completions.endpoint import COMPLETIONS
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.documentation import DOCUMENTATION
from deployments.ingress.api.keys.endpoint import KEYS
from deployments.ingress.api.models import MODELS
from deployments.ingress.api.operations import OPERATIONS
from deployments.ingress.api.tokens import TOKENS
from deployments.ingress.api.usage import USAGE

__all__ = ["ENDPOINTS"]

ENDPOINTS: Final[tuple[Endpoint, ...]] = (COMPLETIONS, MODELS, TOKENS, USAGE, KEYS, OPERATIONS, DOCUMENTATION)
