"""A real S3 server behind a proxy that breaks things on demand, for tests and benchmarks.

The server is moto's, spoken to over HTTP; the proxy in front of it forwards every byte and follows the faults that a test
asks for: answers with an error status, cuts a connection in the middle of a body, or lets it stall. Both run in a process
of their own, since tests fork loading processes, and forks of a process with a server's threads in it can deadlock.

    with s3_server() as server:
        url = server.upload(folder, "bucket/prefix")
        server.break_next(match="part-00001", kind="cut", after=1000, times=2)
        ...
        server.downloads("part-00001")     # how often its bytes were asked for
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
CONTROL = "/_control"
PIECE = 1 << 14


class Server:
    """The test's side: uploads, faults, and what was asked of the server."""

    def __init__(self, proxy_port: int, moto_port: int) -> None:
        self.proxy_port = proxy_port
        self.moto_port = moto_port

    def url(self, place: str, *, through_proxy: bool = True) -> str:
        """`bucket/prefix` as an URL that `Cache.open` takes."""
        port = self.proxy_port if through_proxy else self.moto_port
        return f"s3://{place}?scheme=http&endpoint_override=127.0.0.1:{port}"

    def upload(self, folder: Path, place: str) -> str:
        """Copy a folder to `bucket/prefix`, the manifest last; returns its URL."""
        from pyarrow import fs

        store, root = fs.FileSystem.from_uri(self.url(place, through_proxy=False) + "&allow_bucket_creation=true")
        store.create_dir(root.split("/")[0])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == "manifest.json"):
            with store.open_output_stream(f"{root}/{path.relative_to(folder).as_posix()}") as stream:
                stream.write(path.read_bytes())
        return self.url(place)

    def replace(self, key: str, data: bytes) -> None:
        """Change an object behind everybody's back."""
        from pyarrow import fs

        store, path = fs.FileSystem.from_uri(self.url(key, through_proxy=False))
        with store.open_output_stream(path) as stream:
            stream.write(data)

    def delete(self, key: str) -> None:
        """Remove an object."""
        from pyarrow import fs

        store, path = fs.FileSystem.from_uri(self.url(key, through_proxy=False))
        store.delete_file(path)

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        from pyarrow import fs

        store, root = fs.FileSystem.from_uri(self.url(name, through_proxy=False) + "&allow_bucket_creation=true")
        store.create_dir(root)

    def names(self, place: str) -> list[str]:
        """Names of everything below `bucket/prefix`."""
        bucket, _, prefix = place.partition("/")
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return [entry["Key"].removeprefix(f"{prefix}/") for page in pages for entry in page.get("Contents", ())]

    def objects(self, place: str) -> dict[str, bytes]:
        """Everything below `bucket/prefix`, by name."""
        bucket, _, prefix = place.partition("/")
        client = self._client()
        return {
            name: client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read() for name in self.names(place)
        }

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor aborted."""
        return [upload["Key"] for upload in self._client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())]

    def _client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.moto_port}")

    def break_next(self, *, match: str, kind: str, times: int = 1, method: str = "GET", **details: Any) -> None:
        """Break the next requests whose path holds `match`: `times` of them, or all for -1.

        Kinds: `status` (with `status`), `cut` (after `after` bytes of the body), `stall` (after `after` bytes, for
        `seconds`), `cut upload` (after `after` bytes of what is sent), `stall upload` (the same, for `seconds`), `no answer`
        (to a request that is carried out).
        """
        self._post({"fault": {"match": match, "kind": kind, "times": times, "method": method, **details}})

    def forget(self) -> None:
        """No more faults, and an empty log."""
        self._post({"forget": True})

    def log(self) -> list[dict[str, Any]]:
        """Requests in order: `method`, `path`, `range`."""
        return json.loads(urllib.request.urlopen(f"http://127.0.0.1:{self.proxy_port}{CONTROL}").read())

    def downloads(self, match: str) -> int:
        """The number of requests that asked for the bytes of objects whose path holds `match`."""
        return sum(entry["method"] == "GET" and match in entry["path"] for entry in self.log())

    def _post(self, data: dict[str, Any]) -> None:
        url = f"http://127.0.0.1:{self.proxy_port}{CONTROL}"
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(data).encode(), method="POST")).read()


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Start both in a process of their own; the credentials that they take are in the environment meanwhile."""
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(**json.loads(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# --------------------------------------------------------------------------- the server's side


class Proxy(ThreadingHTTPServer):
    """Forwards to moto; one thread a connection."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, moto_port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.moto_port = moto_port
        self.lock = threading.Lock()
        self.faults: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []

    def fault_for(self, method: str, path: str) -> dict[str, Any] | None:
        with self.lock:
            for fault in self.faults:
                if fault["times"] and fault["method"] == method and fault["match"] in path:
                    fault["times"] -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One request: forwarded, or broken."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        if self.path == CONTROL:
            return self._answer(200, json.dumps(self.server.log).encode())
        fault = self._fault()
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault["kind"].endswith(" upload"):
            self.rfile.read(min(length, fault.get("after", 0)))
            time.sleep(fault.get("seconds", 0))
            return self._cut()
        sent = self.rfile.read(length)
        if fault is not None and fault["kind"] == "status":
            code = (
                b"AccessDenied" if fault["status"] == 403 else b"InternalError"
            )  # clients go by it, not by the status
            body = b"" if self.command == "HEAD" else b"<Error><Code>%s</Code></Error>" % code
            return self._answer(fault["status"], body)
        status, headers, body = self._forward(sent)
        if fault is not None and fault["kind"] == "no answer":
            return self._cut()
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if fault is None or self.command == "HEAD":
            self.wfile.write(body)
            return None
        self.wfile.write(body[: fault.get("after", 0)])
        self.wfile.flush()
        if fault["kind"] == "stall":
            time.sleep(fault["seconds"])
            self.wfile.write(body[fault.get("after", 0) :])
            return None
        return self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_PUT = do_DELETE = do_GET

    def do_POST(self) -> None:
        if self.path != CONTROL:  # many deletions in one request
            return self.do_GET()
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            if "fault" in asked:
                self.server.faults.append(asked["fault"])
            else:
                self.server.faults.clear()
                self.server.log.clear()
        return self._answer(200, b"{}")

    def _fault(self) -> dict[str, Any] | None:
        entry = {"method": self.command, "path": self.path, "range": self.headers.get("Range")}
        with self.server.lock:
            self.server.log.append(entry)
        return self.server.fault_for(self.command, self.path)

    def _forward(self, sent: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.moto_port)
        connection.request(self.command, self.path, sent or None, dict(self.headers))
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the log is asked for."""


def serve() -> None:
    """Run until stdin closes, which it does when the test's process ends, however it ends."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    print(json.dumps({"proxy_port": proxy.server_port, "moto_port": proxy.moto_port}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve()
