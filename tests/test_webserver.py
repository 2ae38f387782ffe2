"""Reports on the same origin as the UI, and nothing else of the data folder."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from orchestration import webserver

Get = Callable[[str], tuple[int, str]]


@pytest.fixture
def get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Get:
    reports = tmp_path / "data" / "toy" / "reports"
    (reports / "coverage").mkdir(parents=True)
    (reports / "evidence.html").write_text("the evidence")
    (reports / "coverage" / "index.html").write_text("the checks")
    (tmp_path / "data" / "toy" / "raw").mkdir()
    (tmp_path / "data" / "toy" / "raw" / "secret.parquet").write_text("raw")
    monkeypatch.setattr(webserver, "ROOT", tmp_path)
    app = Starlette(
        routes=[
            Route("/reports/", webserver.index),
            Mount("/reports", webserver.Reports(directory=tmp_path / "data", html=True)),
        ]
    )
    return lambda path: request(app, path)


def request(app: Starlette, path: str) -> tuple[int, str]:
    """GET a path, as the server hands it on: percent signs already decoded."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()  # the client stays connected
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [], "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80)}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], body.decode()


def test_pages_are_served_and_listed(get: Get) -> None:
    assert get("/reports/toy/evidence.html") == (200, "the evidence")
    assert get("/reports/toy/coverage/index.html") == (200, "the checks")
    status, listing = get("/reports/")
    assert status == 200 and "/reports/toy/evidence.html" in listing and "/reports/toy/coverage/index.html" in listing


@pytest.mark.parametrize(
    "path",
    [
        "toy/raw/secret.parquet",
        "toy/../raw/secret.parquet",
        "toy/coverage/../../raw/secret.parquet",
        "../toy/raw/secret.parquet",
        "../../data/toy/raw/secret.parquet",
        "toy//raw/secret.parquet",
        "toy/missing.html",
    ],
)
def test_nothing_else_is(get: Get, path: str) -> None:
    assert get(f"/reports/{path}")[0] == 404


def test_dagsters_own_server_serves_them_before_its_own_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster's class is not a documented one: this fails when an upgrade changes how it builds routes."""
    (tmp_path / "data" / "toy" / "reports").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "reports" / "evidence.html").write_text("the evidence")
    monkeypatch.setattr(webserver, "ROOT", tmp_path)
    server = webserver.ReportsWebserver.__new__(webserver.ReportsWebserver)
    vars(server).update(_app_path_prefix="", _live_data_poll_rate=None, _uses_app_path_prefix=False)
    routes = server.build_routes()
    assert request(Starlette(routes=routes), "/reports/toy/evidence.html") == (200, "the evidence")
    assert "/graphql" in [getattr(route, "path", None) for route in routes]
