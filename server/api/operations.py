"""Routes for those who run the server: health, version, metrics. No key needed, unless all routes are protected."""

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from server import __version__
from server.api.client import EngineClient
from server.api.engine_status import EngineStatus
from server.api.routing import errors
from server.api.schemas.server import Health, Version
from server.metrics import EngineCollector, HttpMetrics


def operations_router(client: EngineClient, http_metrics: HttpMetrics) -> APIRouter:
    """The routes, bound to one engine."""
    registry = CollectorRegistry()
    registry.register(
        EngineCollector(
            stats=lambda: client.stats,
            ready=lambda: client.status is EngineStatus.READY,
            asleep=lambda: client.status is EngineStatus.ASLEEP,
            deaths=lambda: client.engine_deaths,
            api_deaths=lambda: client.api_deaths,
        )
    )
    http_metrics.register(registry)
    router = APIRouter()

    @router.get(
        "/health",
        summary="Whether requests are served",
        response_description="They are.",
        responses=errors(503),
    )
    async def health() -> Health:
        """200 while the engine takes requests, else 503."""
        client.require_ready()
        return Health(status="ready")

    @router.get(
        "/health/ready", summary="Whether requests are served", response_description="They are.", responses=errors(503)
    )
    async def ready() -> Health:
        """The same as `/health`, under the name that probes of orchestrators look for."""
        client.require_ready()
        return Health(status="ready")

    @router.get("/health/live", summary="Whether this process answers", response_description="It does.")
    async def live() -> Health:
        """Always 200, also while the engine loads, is being replaced or drains: `status` says which."""
        return Health(status=client.status.value)

    @router.get("/version", summary="The server's version", response_description="The version.")
    async def version() -> Version:
        """The version of Gale."""
        return Version(version=__version__)

    @router.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        response_description="The metrics.",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """The engine's newest figures, and those of all API processes, in Prometheus' text format."""
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    return router
