"""The URL of a remote store. What is secret in it is in no text that is made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

GIVES = (
    "give file:///DIRECTORY, redis://HOST:PORT, rediss://HOST:PORT, s3://BUCKET/PREFIX, "
    "mooncake://MASTER:PORT or hicache://BACKEND"
)

# Options of each kind, as they stand behind the URL's ``?``.
_OPTIONS = {
    "file": {"max_gb", "mounted"},
    "redis": {"db"},
    "rediss": {"db", "ca_file"},
    "s3": {"endpoint", "region", "ca_file"},
    "mooncake": {"protocol", "device", "metadata", "host"},
    "hicache": None,  # the backend knows
}
_PORTS = {"redis": 6379, "rediss": 6379, "mooncake": 50051}


@dataclass(frozen=True)
class RemoteUrl:
    """What people write to name a store, in parts."""

    scheme: str
    host: str = ""  # s3: the bucket; hicache: the backend
    port: int = 0
    path: str = ""  # file: the directory; s3: the prefix
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        """Without credentials."""
        if self.scheme == "file":
            return f"file://{self.path}"
        if self.scheme == "hicache":
            return f"hicache://{self.host}"
        if self.scheme == "s3":
            return f"s3://{self.host}/{self.path}"
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def has_credentials(self) -> bool:
        return bool(self.username or self.password)

    def number(self, name: str) -> float | None:
        """An option that is a number above 0; None if it is not given."""
        return float(self.options[name]) if name in self.options else None


def parse_remote_url(text: str) -> RemoteUrl:
    """
    Raises:
        ValueError: it cannot be meant; says why, and nothing that may be secret.
    """
    if "#" in text:
        raise ValueError("has a '#', which would end it; write it as %23")
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError:
        raise ValueError(f"is no URL; {GIVES}") from None
    scheme = parts.scheme
    if scheme not in _OPTIONS:
        why = f"there is no store {scheme!r} here" if scheme else "names no kind of store"
        raise ValueError(f"{why}; {GIVES}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = _OPTIONS[scheme]
    for name in options:
        if known is not None and name not in known:
            allowed = ", ".join(sorted(known))
            raise ValueError(f"{scheme}:// has no option {name!r}; there is {allowed}")
    for name in {"max_gb"} & options.keys():
        if not _is_above_zero(options[name]):
            raise ValueError(f"{name} must be a number above 0 (got {options[name]!r})")
    if options.get("mounted", "yes") != "yes":
        raise ValueError(f"mounted can only be yes (got {options['mounted']!r}); or leave it out")
    if scheme == "file":
        path = unquote(parts.path)
        if parts.hostname not in (None, "localhost") or not path.startswith("/") or "\0" in path:
            raise ValueError("needs a path from the root: file:///mnt/cache")
        return RemoteUrl(scheme, path=str(PurePosixPath(path)), options=options)
    if scheme == "hicache":
        if not re.fullmatch(r"\w+", parts.netloc) or parts.path.strip("/"):
            raise ValueError("names no backend; write hicache://BACKEND?NAME=VALUE, e.g. hicache://file")
        return RemoteUrl(scheme, host=parts.netloc, options=options)
    if scheme == "s3":
        return _s3(parts, options)
    if not parts.hostname:
        raise ValueError(f"names no host; write {scheme}://HOST:PORT")
    if scheme == "mooncake":
        if "@" in parts.netloc:
            raise ValueError("takes no credentials: Mooncake Store has none")
        if parts.path.strip("/"):
            raise ValueError("has nothing behind mooncake://MASTER:PORT but options")
        port = _PORTS[scheme] if port is None else port
        return RemoteUrl(scheme, host=parts.hostname, port=port, options=options)
    database = parts.path.strip("/")
    if database:
        options.setdefault("db", database)
    if not options.get("db", "0").isdecimal():
        raise ValueError(f"the database behind {scheme}://HOST:PORT/ is a number, or nothing")
    return RemoteUrl(
        scheme,
        host=parts.hostname,
        port=_PORTS[scheme] if port is None else port,
        options=options,
        username=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def _s3(parts: SplitResult, options: Mapping[str, str]) -> RemoteUrl:
    if "@" in parts.netloc:
        raise ValueError("takes no credentials: they come from AWS_ACCESS_KEY_ID or ~/.aws/credentials")
    if not parts.netloc or ":" in parts.netloc:
        raise ValueError("names no bucket; write s3://BUCKET/PREFIX?endpoint=http://HOST:PORT")
    endpoint = options.get("endpoint")
    if endpoint is not None:
        found = urlsplit(endpoint)
        if found.scheme not in ("http", "https") or not found.hostname or "@" in found.netloc:
            raise ValueError("endpoint must be http://HOST:PORT or https://HOST:PORT, without credentials")
    return RemoteUrl("s3", host=parts.netloc, path=unquote(parts.path).strip("/"), options=options)


def _is_above_zero(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
