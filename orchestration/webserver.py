"""The Dagster UI with the reports on the same origin, under /reports, so that links from assets open.

python -m orchestration.webserver            the UI on 127.0.0.1:3000, with the daemon that runs schedules and sensors
"""

import argparse
import html
import os
import signal
import subprocess
import sys
from pathlib import Path

import dagster_webserver.app
from dagster_webserver import cli
from dagster_webserver.webserver import DagsterWebserver
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

ROOT = Path(__file__).parent.parent


class Reports(StaticFiles):
    """/reports/<dataset>/<file> is data/<dataset>/reports/<file>; nothing else under data is served."""

    def get_path(self, scope) -> str:
        path = super().get_path(scope)
        if ".." in path.split(os.sep):
            raise HTTPException(status_code=404)
        dataset, _, rest = path.partition(os.sep)
        return os.path.join(dataset, "reports", rest)


def index(request: Request) -> HTMLResponse:
    """Every report there is, by dataset."""
    parts = ["<!doctype html><meta charset=utf-8><title>Reports</title><body style='font:15px system-ui;margin:2rem'>"]
    for folder in sorted((ROOT / "data").glob("*/reports")):
        dataset = folder.parent.name
        pages = [path.name for path in sorted(folder.glob("*.html"))]
        pages += ["coverage/index.html"] if (folder / "coverage" / "index.html").exists() else []
        links = "".join(f"<li><a href='/reports/{dataset}/{html.escape(p)}'>{html.escape(p)}</a>" for p in pages)
        parts.append(f"<h2>{html.escape(dataset)}</h2><ul>{links}</ul>")
    return HTMLResponse("".join(parts))


class ReportsWebserver(DagsterWebserver):
    """Dagster's own server with two routes more."""

    def build_routes(self) -> list[BaseRoute]:
        reports = Reports(directory=ROOT / "data", html=True)
        return [Route("/reports/", index), Mount("/reports", reports, name="reports"), *super().build_routes()]


def serve() -> None:
    """Dagster's webserver command with `ReportsWebserver` in place of its own."""
    setattr(dagster_webserver.app, "DagsterWebserver", ReportsWebserver)  # noqa: B010  where the command looks it up
    cli.main()


def main() -> int:
    parser = argparse.ArgumentParser(description="The Dagster UI with the reports under /reports.")
    parser.add_argument("--port", type=int, default=3000)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that stopping this process stops both of its own
    os.environ.setdefault("DAGSTER_HOME", str(ROOT / ".dagster"))  # as `make` has it: the daemon does not start without
    serving = "import orchestration.webserver as w; w.serve()"
    commands = [
        [sys.executable, "-m", "dagster._daemon", "run"],
        [sys.executable, "-c", serving, "-h", "127.0.0.1", "-p", str(arguments.port)],
    ]
    running = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        return running[-1].wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
