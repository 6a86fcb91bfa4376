"""Texts to token ids and back, for callers who count or cut prompts: vLLM's `/tokenize` and `/detokenize`.

Special tokens are handled as vLLM 0.32 does: `/tokenize` adds those that prompts get, `/detokenize` keeps all.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from deployments.ingress.api.description.answers import Answer, Count
from deployments.ingress.api.description.endpoint import Endpoint
from deployments.ingress.api.description.operations import (
    ANY_WITH_KEY,
    READING_A_BODY,
    answered,
    json_content,
    operation,
    posted,
)
from deployments.ingress.api.description.tables import parameter_table
from deployments.ingress.api.parameter_types import MAX_MODEL_NAME, NotServed, TokenIds
from deployments.ingress.api.services import Caller, RequestBody, ServicesOf
from deployments.ingress.errors import InvalidRequest
from deployments.ingress.http.json_body import Body, parsed_body
from deployments.ingress.http.json_response import json_response
from deployments.ingress.routing.catalog import Catalog, ServedModel

__all__ = ["TOKENS", "DetokenizeRequest", "TokenizeRequest"]

_INLINE_SIZE = 2048
"""Characters or token ids handled on the event loop: well under a millisecond. More goes to a thread."""
_THREADS = 2
_MAX_TOKENS = 2**18
"""Of one text: what its answer tells is made with the GIL held."""
_MAX_TEXT_BYTES = 2**20
"""Tokenizing takes some 150 bytes of memory for each token, of which there may be nearly as many as bytes."""

_CHAT = "only a prompt can be tokenized, not a chat"


_ModelName = Annotated[str, Field(max_length=MAX_MODEL_NAME)]


class TokenizeRequest(Body):
    content = frozenset({"prompt"})

    model: _ModelName | None = None
    """Name of the model; may be left out where the server has only one."""
    prompt: str
    """The text, of at most 1048576 bytes in UTF-8."""
    add_special_tokens: bool | None = True
    """With the special tokens that the model's tokenizer puts around a text."""
    return_token_strs: bool | None = False
    """With the tokens as they stand in the vocabulary."""

    messages: Annotated[None, NotServed(_CHAT)] = None
    add_generation_prompt: Annotated[bool | None, NotServed(_CHAT)] = None
    continue_final_message: Annotated[bool | None, NotServed(_CHAT, neutral=False)] = None
    chat_template: Annotated[None, NotServed(_CHAT)] = None
    chat_template_kwargs: Annotated[None, NotServed(_CHAT)] = None
    media_io_kwargs: Annotated[None, NotServed(_CHAT)] = None
    mm_processor_kwargs: Annotated[None, NotServed(_CHAT)] = None
    tools: Annotated[None, NotServed(_CHAT)] = None


class DetokenizeRequest(Body):
    content = frozenset({"tokens"})

    model: _ModelName | None = None
    """Name of the model; may be left out where the server has only one."""
    tokens: TokenIds
    """Token ids."""


class TokenizeResponse(Answer):
    count: Count
    max_model_len: int
    """Tokens of a prompt and its completion together, at most."""
    tokens: list[int]
    token_strs: list[str] | None
    """With `return_token_strs`: the tokens as they stand in the vocabulary."""


class DetokenizeResponse(Answer):
    prompt: str


_router = APIRouter()
_threads = CapacityLimiter(_THREADS)
_STATUSES: Final = (400, 404, *ANY_WITH_KEY, *READING_A_BODY)


@_router.post(
    "/tokenize",
    openapi_extra=operation(
        "Turn a text into token ids",
        "tokenize",
        answered("The tokens.", json_content("TokenizeResponse")),
        *_STATUSES,
        requestBody=posted("TokenizeRequest", {"model": "smollm2-135m", "prompt": "Once upon a time"}),
    ),
)
async def tokenize(services: ServicesOf, _key: Caller, body: RequestBody) -> Response:
    request = await parsed_body(body, TokenizeRequest)
    if (size := len(request.prompt.encode())) > _MAX_TEXT_BYTES:
        raise InvalidRequest(
            f"The text has {size} bytes; expected at most {_MAX_TEXT_BYTES}. Tokenize it in parts.", param="prompt"
        )
    model = _model(services.catalog, request.model)
    if len(request.prompt) <= _INLINE_SIZE:
        return json_response(_tokenized(model, request))
    return json_response(await run_sync(_tokenized, model, request, limiter=_threads))


@_router.post(
    "/detokenize",
    openapi_extra=operation(
        "Turn token ids into a text",
        "detokenize",
        answered("The text.", json_content("DetokenizeResponse")),
        *_STATUSES,
        requestBody=posted("DetokenizeRequest", {"model": "smollm2-135m", "tokens": [504, 2365]}),
    ),
)
async def detokenize(services: ServicesOf, _key: Caller, body: RequestBody) -> Response:
    request = await parsed_body(body, DetokenizeRequest)
    model = _model(services.catalog, request.model)
    if len(request.tokens) <= _INLINE_SIZE:
        return json_response(_detokenized(model, request))
    return json_response(await run_sync(_detokenized, model, request, limiter=_threads))


def _model(catalog: Catalog, name: str | None) -> ServedModel:
    if name is not None:
        return catalog.find(name)
    models = catalog.models()
    if len(models) != 1:
        raise InvalidRequest(
            "Missing required parameter: 'model'. GET /v1/models lists the models.", param="model", kind="missing"
        )
    return models[0]


def _tokenized(model: ServedModel, request: TokenizeRequest) -> bytes:
    # Unlike `encode` it does not hold the GIL (deployments/meter/admission/tokenizer.py).
    [encoding] = model.tokenizer.encode_batch_fast(
        [request.prompt], add_special_tokens=request.add_special_tokens is not False
    )
    if len(encoding) > _MAX_TOKENS:
        raise InvalidRequest(f"The text has {len(encoding)} tokens; expected at most {_MAX_TOKENS}.", param="prompt")
    tokens: list[int] = encoding.ids
    answer: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": model.entry.max_model_len,
        "tokens": tokens,
        # Not by `map`, which would keep the GIL from all other threads until its end.
        "token_strs": [model.tokenizer.id_to_token(token) for token in tokens] if request.return_token_strs else None,
    }
    return msgspec.json.encode(answer)


def _detokenized(model: ServedModel, request: DetokenizeRequest) -> bytes:
    tokens = request.tokens
    for token_id in set(tokens):
        if model.tokenizer.id_to_token(token_id) is None:
            raise InvalidRequest(f"Token id {token_id} is out of vocabulary.", param="tokens")
    # Unlike `decode` it does not hold the GIL.
    [text] = model.tokenizer.decode_batch([tokens], skip_special_tokens=False)
    return msgspec.json.encode({"prompt": text})


def _reference() -> str:
    return "\n".join(
        [
            "## Tokens\n",
            "In the shapes of vLLM. `POST /tokenize`:\n",
            parameter_table(TokenizeRequest, source=False),
            "`POST /detokenize`:\n",
            parameter_table(DetokenizeRequest, source=False),
        ]
    )


TOKENS: Final = Endpoint(
    "tokens",
    "Texts as models see them, in the shapes of vLLM.",
    _router,
    (TokenizeRequest, DetokenizeRequest, TokenizeResponse, DetokenizeResponse),
    _reference,
)
