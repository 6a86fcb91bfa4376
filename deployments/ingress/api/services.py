"""What endpoints work with, and the dependencies by which they ask for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from deployments.contracts import IngressCounters, KeyInfo
from deployments.ingress.errors import InvalidApiKey, PermissionDenied
from deployments.ingress.http import body_reading
from deployments.ingress.http.auth import Credential, credentials_of, key_in, missing_key
from deployments.ingress.meter_client import MeterClient
from deployments.ingress.metrics import ResponseCounts
from deployments.ingress.routing.catalog import Catalog

__all__ = ["Admin", "Caller", "IngressSettings", "RequestBody", "Services", "ServicesOf", "services_of"]


@dataclass(frozen=True)
class IngressSettings:
    request_body_limit_bytes: int
    keep_alive_s: float
    request_timeout_s: float | None = None
    upload_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Services:
    catalog: Catalog
    meter: MeterClient
    settings: IngressSettings
    other_counters: Callable[[], Awaitable[list[IngressCounters]]]
    """Of all other ingress replicas."""
    responses: ResponseCounts
    document: Callable[[], bytes]
    """The OpenAPI document of all endpoints."""

    async def authenticate(self, request: Request, credentials: tuple[Credential, ...]) -> KeyInfo:
        """Raises InvalidApiKey, ServiceUnavailable."""
        if key := key_in(request.headers, credentials):
            return await self.meter.authenticate(key)
        try:
            return await self.meter.authenticate("")  # who it is if the cluster requires no keys
        except InvalidApiKey:
            raise missing_key(request.headers, credentials) from None

    async def read_body(self, request: Request) -> bytes:
        """Raises UnsupportedMediaType, UnsupportedEncoding, BodyTooLarge, InvalidRequest, RequestTimeout."""
        return await body_reading.read_body(request, self.settings.request_body_limit_bytes)


async def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesOf = Annotated[Services, Depends(services_of)]


async def _caller(request: Request, services: ServicesOf) -> KeyInfo:
    return await services.authenticate(request, credentials_of(request.headers))


Caller = Annotated[KeyInfo, Depends(_caller)]


async def _admin(key: Caller) -> KeyInfo:
    if not key.admin:
        raise PermissionDenied("This needs the admin key.")
    return key


Admin = Annotated[KeyInfo, Depends(_admin)]


async def _body(request: Request, services: ServicesOf) -> bytes:
    return await services.read_body(request)


RequestBody = Annotated[bytes, Depends(_body)]
"""Ask for it behind Caller or Admin: strangers send nothing that is read."""
