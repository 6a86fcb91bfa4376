"""`/v1/models`: what can be asked."""

from __future__ import annotations

from typing import Any, Final, Literal

from fastapi import APIRouter

from deployments.contracts import KeyInfo
from deployments.ingress.api.description.answers import Answer
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.operations import ANY_WITH_KEY, answered, json_content, operation, parameter
from deployments.ingress.api.services import Caller, ServicesOf
from deployments.ingress.routing.catalog import ServedModel

__all__ = ["MODELS"]


class ModelPermission(Answer):
    """The same of every model: what a key may do is told by the key."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: Literal[False]
    allow_sampling: Literal[True]
    allow_logprobs: Literal[True]
    allow_search_indices: Literal[False]
    allow_view: Literal[True]
    allow_fine_tuning: Literal[False]
    organization: Literal["*"]
    group: None
    is_blocking: Literal[False]


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    """Unix time in seconds since which this server has it."""
    owned_by: str
    root: str
    """The name by which the Hugging Face hub knows it, where the operator told it: clients load its tokenizer by that.
    Else `id`."""
    parent: str | None
    """Of an alias: the model's own name, which answers and usage have."""
    max_model_len: int
    """Tokens of a prompt and its completion together, at most."""
    permission: list[ModelPermission]


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


_router = APIRouter()
MODELS: Final = Endpoint("models", "What can complete.", _router, (Model, ModelList))


@_router.get(
    "/v1/models",
    openapi_extra=operation(
        "List the models",
        "listModels",
        answered("Those that the key may use.", json_content("ModelList")),
        *ANY_WITH_KEY,
    ),
)
async def list_models(services: ServicesOf, key: Caller) -> dict[str, Any]:
    usable = [model for model in services.catalog.models() if _usable(model, key)]
    return {"object": "list", "data": [_model_card(model, name) for model in usable for name in model.entry.names]}


@_router.get(
    "/v1/models/{model:path}",  # names have slashes
    openapi_extra=operation(
        "Get a model",
        "retrieveModel",
        answered("It.", json_content("Model")),
        *ANY_WITH_KEY,
        404,
        parameters=[parameter("model", "Its name.", {"type": "string"}, required=True, place="path")],
    ),
)
async def retrieve_model(model: str, services: ServicesOf, _key: Caller) -> dict[str, Any]:
    return _model_card(services.catalog.find(model), model)


def _usable(model: ServedModel, key: KeyInfo) -> bool:
    """The meter decides on requests in the same way (deployments/meter/admission/admission.py)."""
    return key.models is None or any(name in key.models for name in model.entry.names)


def _model_card(model: ServedModel, name: str) -> dict[str, Any]:
    """Under `name`, one of its names, in the shape of vLLM's, on whose fields its own clients insist."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "millstream",
        "root": model.entry.root or model.entry.name,
        "parent": None if name == model.entry.name else model.entry.name,
        "max_model_len": model.entry.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": model.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }
