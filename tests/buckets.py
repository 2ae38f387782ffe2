"""A server of S3 on this machine and a bucket of logs: what tests make fixtures of."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

SECRET = "very-secret"


def serve() -> Iterator[str]:
    """The address of a server, which is gone afterwards."""
    before = set(threading.enumerate())
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    serving = set(threading.enumerate()) - before
    host, port = server.get_host_and_port()
    assert host == "127.0.0.1"
    yield f"http://{host}:{port}"
    server.stop()
    assert server._server is not None
    server._server.server_close()  # stop() leaves the socket open
    assert serving and not any(thread.is_alive() for thread in serving)


def clear_clients() -> None:
    """Forget clients that were made under another environment."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def own_bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client that owns the bucket `logs`, in the environment of a user of that server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "AKIAEXAMPLE", "SECRET_ACCESS_KEY": SECRET, "MAX_ATTEMPTS": "1"}
    given |= {"DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}
    for name, value in given.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    clear_clients()
    client: Any = boto3.client("s3")
    client.create_bucket(Bucket="logs")
    yield client
    for item in client.list_objects_v2(Bucket="logs").get("Contents", []):
        client.delete_object(Bucket="logs", Key=item["Key"])
    client.delete_bucket(Bucket="logs")
    client.close()
    clear_clients()
