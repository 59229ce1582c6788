"""Certificates of a test's own: a CA, and what it has signed for this machine."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from service import is_missing


@dataclass(frozen=True)
class Certificates:
    ca: Path
    certificate: Path  # for localhost and 127.0.0.1
    key: Path


def make_certificates(directory: Path) -> Certificates:
    """Where there is no openssl the test is skipped, but not on CI."""
    if shutil.which("openssl") is None:
        is_missing("openssl")
    made = Certificates(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    ca_key, request, names = (directory / name for name in ("ca-key.pem", "request.pem", "names"))
    # What Python 3.13 wants to see of a CA and of what it has signed.
    names.write_text(
        "basicConstraints=CA:FALSE\nsubjectAltName=DNS:localhost,IP:127.0.0.1\n"
        "authorityKeyIdentifier=keyid\nsubjectKeyIdentifier=hash\n"
    )
    new_key = ("-newkey", "rsa:2048", "-nodes")
    for command in (
        (
            *("req", "-x509", *new_key, "-days", "2", "-subj", "/CN=ca", "-keyout", ca_key),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", made.ca),
        ),
        ("req", *new_key, "-subj", "/CN=localhost", "-keyout", made.key, "-out", request),
        (
            *("x509", "-req", "-in", request, "-CA", made.ca, "-CAkey", ca_key, "-CAcreateserial"),
            *("-days", "2", "-extfile", names, "-out", made.certificate),
        ),
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    return made
