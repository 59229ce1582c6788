"""S3 and what speaks its language (obstore): a value is an object.

::

    s3://<bucket>/<prefix>?endpoint=http://HOST:PORT&region=REGION
    <bucket>/<prefix>/fkv1/<namespace>/<key>

Every value is a request of its own, which takes a millisecond at least: those of a call are made side by side
by threads that all sessions share. Credentials are found as AWS's own programs find them: in the environment,
in ``~/.aws/credentials``, or from the machine or container that this runs in. What is too old goes by a
lifecycle rule of the bucket; nothing is ever removed from here.
"""

from __future__ import annotations

import configparser
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sglang_flexkv.common.config import environment
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    StoreError,
    StoreFullError,
    Value,
    fits,
    import_client,
    leading,
    outcomes_of,
    search_leading,
    search_windows,
)

T = TypeVar("T")

_SIDE_BY_SIDE = 16  # requests, of all sessions
_CHUNK = 512 << 10  # that an object is received in

# What obstore's errors say of the answer; the rest of them may show more than anybody should see.
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_HTTP_KIND = re.compile(r"kind: (Connect|Timeout)\b")
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w{1,60})")
_METADATA = re.compile(r"/latest/(api/token|meta-data)|169\.254\.")

_TO_BE_CHANGED = {
    "NoSuchBucket": "there is no such bucket; create it, or correct the URL",
    "InvalidAccessKeyId": "it does not know the access key; correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong; correct AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    "PermanentRedirect": "the bucket is in another region; name it, ?region=REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; name it, ?region=REGION",
    "AccessDenied": "these credentials may not read, write or list here; let them use GetObject and "
    "PutObject on the prefix and ListBucket on the bucket",
}
_BY_STATUS = {"301": "PermanentRedirect", "401": "AccessDenied", "403": "AccessDenied"}


class _Refused(StoreError):
    """The server says no, and will until somebody changes something."""


class S3Store(Store):
    def __init__(self, url: RemoteUrl, timeout_s: float) -> None:
        self._url, self.timeout_s = url, timeout_s
        endpoint = url.options.get("endpoint", "")
        self.name = f"S3 bucket {url.host}" + (f" at {endpoint}" if endpoint else "")
        self.client: Any = None  # obstore
        self.bucket: Any = None
        self._threads: ThreadPoolExecutor | None = None

    def open(self) -> None:
        self.client = import_client("obstore", "S3", "s3")
        stores = import_client("obstore.store", "S3", "s3")
        url = self._url
        is_plain = url.options.get("endpoint", "").startswith("http://")
        options: dict[str, Any] = {
            "region": url.options.get("region") or _region() or "us-east-1",
            "client_options": {
                "timeout": f"{int(self.timeout_s * 1000)}ms",
                "connect_timeout": f"{int(self.timeout_s * 1000)}ms",
                "allow_http": is_plain,
            },
            # TLS keeps what is stored from being changed on its way. To sign it as well takes both sides a
            # SHA-256 of it, a large part of what storing it takes.
            "unsigned_payload": not is_plain,
            "retry_config": {"max_retries": 0},  # who calls knows what may be tried again
            **_credentials(),
        }
        if "endpoint" in url.options:
            options["endpoint"] = url.options["endpoint"]
        if "ca_file" in url.options:
            try:
                options["client_options"]["root_certificate"] = Path(url.options["ca_file"]).read_bytes()
            except OSError as error:
                raise ConfigError(
                    f"remote: ca_file cannot be read: {error.strerror}; correct its path"
                ) from None
        try:
            self.bucket = stores.S3Store(url.host, prefix=url.path or None, **options)
        except Exception as error:  # obstore's own, one for each thing that it does not like
            raise ConfigError(f"remote: {self.name} cannot be used ({type(error).__name__})") from None
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_SIDE_BY_SIDE, "flexkv-s3")
        try:
            self.request(lambda: self.client.get(self.bucket, "fkv1/0/0"))
        except _Refused as error:
            raise ConfigError(f"remote: {error}") from None
        except StoreError as error:
            raise AwayError(f"remote: {error}; start it, or check the endpoint") from None

    def session(self) -> Session:
        return _S3Session(self)

    def notes(self) -> list[str]:
        if "endpoint" not in self._url.options:
            return ["every request costs money: mind remote_admission, and set a lifecycle rule"]
        return ["set a lifecycle rule, or it grows: nothing is removed from here"]

    def close(self) -> None:
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    # ---- for sessions ----

    def request(self, call: Callable[[], T]) -> T | None:
        """What a request brings; None if there is no such object. Raises StoreError."""
        try:
            return call()
        except FileNotFoundError as error:  # obstore's NotFoundError is one
            if "NoSuchBucket" in str(error):
                raise self._refused("NoSuchBucket") from None
            return None
        except Exception as error:  # obstore's have no class in common but this
            raise self._error(str(error)) from None

    def side_by_side(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Raises StoreError, when none of them is under way any more."""
        assert self._threads is not None
        running: list[Future[T]] = []
        try:
            running = [self._threads.submit(call) for call in calls]
        except RuntimeError:
            raise StoreError(f"{self.name} is being closed") from None
        failed: Exception | None = None
        results = []
        for future in running:
            try:
                results.append(future.result())
            except Exception as error:
                failed = failed or error
                for other in running:
                    other.cancel()  # if it has not begun
        if failed is not None:
            raise failed
        return results

    def _error(self, text: str) -> StoreError:
        if _METADATA.search(text):
            return _Refused(
                f"{self.name}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        status, code = _STATUS.search(text), _CODE.search(text)
        if status is None:
            kind = _HTTP_KIND.search(text)
            if "redirect" in text:
                return self._refused("PermanentRedirect")
            if kind is None:  # the connection was lost, for instance because the server has closed it
                return StoreError(f"{self.name}: the connection is gone", temporary=True)
            if certificate := _CERTIFICATE.search(text):
                return _Refused(
                    f"{self.name}: its certificate is not trusted ({certificate[1]}); name its CA, "
                    "?ca_file=FILE, or the host that it is for"
                )
            if kind[1] == "Timeout":
                return StoreError(f"{self.name} has not answered for {self.timeout_s:g} s")
            return StoreError(f"{self.name} cannot be reached")
        what = code[1] if code else _BY_STATUS.get(status[1], status[1])
        stores = "method: PUT" in text
        if what == "AccessDenied" and stores:  # who may not read either is told when it does
            return StoreFullError(str(self._refused(what)))
        if what in _TO_BE_CHANGED:
            return self._refused(what)
        message = f"{self.name} says {what}"
        # What has no room says that it has a fault of its own, or is asked too often. Reading may go on.
        if status[1][0] == "5" and stores:
            return StoreFullError(f"{message} to what is stored")
        return StoreError(message, temporary=status[1] in ("500", "502", "503"))

    def _refused(self, code: str) -> StoreError:
        return _Refused(f"{self.name}: {_TO_BE_CHANGED[code]}")


class _S3Session(Session):
    def __init__(self, store: S3Store) -> None:
        self._store = store
        self._deadline_s = 0.0

    def exists(self, names: Sequence[str]) -> list[bool]:
        return self._each([lambda name=name: self._is_there(name) for name in names])  # type: ignore[misc]

    def count_leading(self, names: Sequence[str]) -> int:
        return search_leading(len(names), lambda positions: self.exists([names[i] for i in positions]))

    def find_windows(self, names: Sequence[str], window: int) -> list[bool]:
        return search_windows(
            len(names), window, lambda positions: self.exists([names[i] for i in positions])
        )

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        pairs = zip(names, values, strict=True)
        got = self._each([lambda n=name, v=value: self._get(n, v, sizes) for name, value in pairs])  # type: ignore[misc]
        return outcomes_of(got, sizes)

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        pairs = zip(names, values, strict=True)
        return self._each([lambda n=name, v=value: self._put(n, v) for name, value in pairs])  # type: ignore[misc]

    def close(self) -> None:
        pass

    def _each(self, calls: list[Callable[[], T]]) -> list[T]:
        # A request has the whole time: what begins before it is over ends within twice that.
        self._deadline_s = time.monotonic() + self._store.timeout_s
        return self._store.side_by_side(calls) if len(calls) > 1 else [call() for call in calls]

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline_s:
            raise StoreError(f"{self._store.name} has not answered for {self._store.timeout_s:g} s")

    def _is_there(self, name: str) -> bool:
        self._check_time()
        store = self._store
        return store.request(lambda: store.client.head(store.bucket, name)) is not None

    def _get(self, name: str, value: Value, sizes: list[int] | None) -> tuple[Outcome, int]:
        self._check_time()
        store = self._store

        def receive() -> tuple[Outcome, int]:
            result = store.client.get(store.bucket, name)
            size = int(result.meta["size"])
            if not fits(size, value, sizes):
                return Outcome.CORRUPT, 0
            received = _fill(leading(value, size), result.stream(min_chunk_size=_CHUNK))
            return (Outcome.GOOD, size) if received == size else (Outcome.CORRUPT, 0)

        return store.request(receive) or (Outcome.MISSING, 0)

    def _put(self, name: str, value: Value) -> Outcome:
        self._check_time()
        store = self._store
        # Joined: obstore may read on in what it was given after a request has failed.
        body = b"".join(value)
        store.request(lambda: store.client.put(store.bucket, name, body, use_multipart=False))
        return Outcome.GOOD


def _fill(value: Value, chunks: Any) -> int:
    """Puts what comes into the pieces. Returns how many bytes came, as far as there was room."""
    rest = [piece for piece in value if len(piece)]
    received = 0
    for chunk in chunks:
        view = memoryview(chunk)
        while view and rest:
            part = min(len(view), len(rest[0]))
            rest[0][:part] = view[:part]
            received += part
            view = view[part:]
            if part == len(rest[0]):
                rest.pop(0)
            else:
                rest[0] = rest[0][part:]
        received += len(view)
    return received


def _region() -> str:
    return environment().get("AWS_REGION") or environment().get("AWS_DEFAULT_REGION") or ""


def _credentials() -> dict[str, str]:
    """From AWS's file of credentials, if there is one and the environment has none; obstore finds the others.

    Raises:
        ConfigError: the file is not what it should be.
    """
    if environment().get("AWS_ACCESS_KEY_ID"):
        return {}
    path = Path(environment().get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    profile = environment().get("AWS_PROFILE") or "default"
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    file = configparser.RawConfigParser()
    try:
        file.read(path)
    except (configparser.Error, UnicodeDecodeError):
        # Its text would show a line of the file.
        raise ConfigError(f"remote: {path} is no file of AWS credentials; correct it") from None
    if not file.has_section(profile):
        return {}
    section = file[profile]
    return {ours: section[theirs] for theirs, ours in names.items() if theirs in section}
