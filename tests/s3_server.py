"""A real S3 server (moto) on loopback, with faults on request, in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

BUCKET = "bucket"
KEY_ID, SECRET = "AKIDLOOPBACK0123456", "vErySecretVaLue+of/the-test/0123456789ab"
# moto does not check signatures
_AUTHORIZATION = (
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, "
    "Signature=0"
)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class S3Server:
    """Client of the server; its methods look at and change what is stored, and set faults."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which s3fs finds the server."""
        return environment_of(self.endpoint)

    def fault(self, kind: str, *, method: str = "", path: str = "", times: int = 1 << 30) -> None:
        """Let requests fail whose method and path match.

        Args:
            kind: "500", "403", "cut" (half of the body, at most 1 MB, is read, then the connection
                "hold" (no answer until the faults are cleared), "slow" (0.2 s per request).
            method: of the requests; "" for all.
            path: regular expression, of path and query.
            times: number of requests that fail.
        """
        fault = {"kind": kind, "method": method, "path": path, "times": times}
        self._call("/__fault", data=json.dumps(fault).encode())

    def clear(self) -> None:
        """Remove all faults, and answer the requests that are held."""
        self._call("/__clear", data=b"{}")

    def num_faults(self) -> int:
        """Return the number of requests that met a fault, those that are held included."""
        return int(json.loads(self._call("/__faults"))["num"])

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Return the objects with their sizes in bytes."""
        text = self._call(f"/{BUCKET}?list-type=2&prefix={urllib.parse.quote(prefix)}").decode()
        found = re.findall(r"<Contents>.*?<Key>(.*?)</Key>.*?<Size>(\d+)</Size>", text, re.DOTALL)
        return {key: int(size) for key, size in found}

    def uploads(self) -> list[str]:
        """Return the keys of the multipart uploads that are not complete."""
        text = self._call(f"/{BUCKET}?uploads").decode()
        return re.findall(r"<Upload>.*?<Key>(.*?)</Key>", text, re.DOTALL)

    def begin_upload(self, key: str) -> None:
        """Begin a multipart upload, as a killed process leaves one."""
        self._call(f"/{BUCKET}/{key}?uploads", data=b"", method="POST")

    def get(self, key: str) -> bytes:
        return self._call(f"/{BUCKET}/{urllib.parse.quote(key)}")

    def put(self, key: str, data: bytes) -> None:
        self._call(f"/{BUCKET}/{urllib.parse.quote(key)}", data=data, method="PUT")

    def delete(self, key: str) -> None:
        self._call(f"/{BUCKET}/{urllib.parse.quote(key)}", method="DELETE")

    def _call(self, path: str, *, data: bytes | None = None, method: str | None = None) -> bytes:
        request = urllib.request.Request(self.endpoint + path, data=data, method=method)
        request.add_header("Authorization", _AUTHORIZATION)
        request.add_header("Content-Type", "application/octet-stream")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())


def environment_of(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Yield a server with an empty bucket."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(os.getpid())], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], 120)[0], "the server did not start"
        server = S3Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
        server._call(f"/{BUCKET}", data=b"", method="PUT")
        yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen; the limit of the test ends one that fails."""
    while not condition():
        time.sleep(0.02)


class _Faulty:
    """WSGI application: moto's, behind the faults that tests ask for."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._cleared = threading.Event()
        self._num = 0

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        path = environ["PATH_INFO"]
        if path.startswith("/__"):
            return self._control(path, environ, start)
        target = f"{path}?{environ['QUERY_STRING']}"
        kind, cleared = self._fault_of(environ["REQUEST_METHOD"], target)
        if kind == "hold":
            cleared.wait()
        elif kind == "slow":
            time.sleep(0.2)
        elif kind == "cut":
            size = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(min(size // 2, 1 << 20))
            environ["werkzeug.socket"].shutdown(2)
        elif kind:
            codes = {"500": "InternalError", "403": "AccessDenied"}
            start(f"{kind} Fault", [("Content-Type", "application/xml")])
            code = f"<Error><Code>{codes[kind]}</Code><Message>on purpose</Message></Error>"
            return [code.encode()]
        return self._app(environ, start)

    def _control(self, path: str, environ: dict[str, Any], start: Any) -> Any:
        with self._lock:
            if path == "/__fault":
                data = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
                self._faults.append(json.loads(data))
            elif path == "/__clear":
                self._faults.clear()
                self._cleared.set()
                self._cleared, self._num = threading.Event(), 0
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps({"num": self._num}).encode()]

    def _fault_of(self, method: str, target: str) -> tuple[str, threading.Event]:
        with self._lock:
            for fault in self._faults:
                is_of_method = fault["method"] in ("", method)
                if fault["times"] > 0 and is_of_method and re.search(fault["path"], target):
                    fault["times"] -= 1
                    self._num += 1
                    return fault["kind"], self._cleared
            return "", self._cleared


def main(parent: int) -> None:
    """Serve until the parent ends; print the port."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.environ.update({"AWS_ACCESS_KEY_ID": "server", "AWS_SECRET_ACCESS_KEY": "server"})
    import logging

    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = _Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
