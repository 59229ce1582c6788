"""Which model computes the KV of this process: what a later process must share to use it.

The SSD tier outlives the process, so a name is not enough: the files behind a path are replaced, and a flag
can change what is computed from them. Everything that can change the KV of a token sequence is a field here;
what only changes how fast it is computed, or how it is scheduled, is not. Whatever cannot be told makes the
identity unique to the process, with a nonce: a miss costs a prefill, a wrong hit a wrong answer.

There are two. On this machine a model's files are known by where they lie, their sizes, times and samples,
which costs nothing. Another machine has the same files elsewhere and since another time: for what servers
share they are known by all that they contain.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from sglang_flexkv.common.config import environment
from sglang_flexkv.integration.compat.arguments import (
    ARGUMENTS,
    FILE_FORMATS,
    PATH_ARGUMENTS,
    declared_variables,
    variables,
)
from sglang_flexkv.integration.file_contents import is_named_by_contents, sha256_of
from sglang_flexkv.storage.ssd_identity import Identity, digest

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_HASHED_SUFFIXES = frozenset({".json", ".py"})
_IRRELEVANT_SUFFIXES = frozenset(
    {".md", ".txt", ".jinja", ".log", ".lock", ".incomplete", ".png", ".jpg", ".pyc", ".pdf"}
)
# Size and time alone miss files whose times were normalised, as images of containers do.
_SAMPLES = 16
_SAMPLE_BYTES = 4096

# Kubernetes adds these for a service whose name begins with sglang.
_SERVICE_ADDRESS = re.compile(
    r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)
# Neither on disk nor in a log, not even as digests.
_SECRET = re.compile(r"(KEY|TOKEN|PASSWD|CREDENTIALS?|AUTH)$|API_KEY|ACCESS_KEY|SECRET|PASSWORD")
# Arguments of which only digests are kept: they may hold what opens a bucket.
_DIGESTED_ARGUMENTS = frozenset({"model_loader_extra_config"})
_URL_SECRETS = re.compile(r"(?<=://)[^/@\s]+(?=@)|(?<=\?)\S+=\S+")


def _option(name: str) -> str:
    """An argument as users type it."""
    return f"--{name.replace('_', '-')}"


# Settings that say where files lie. They count on this machine alone: what is in the files counts anywhere.
_MODELS = ("model_path", "revision", "speculative_draft_model_path", "speculative_draft_model_revision")
_PLACES = frozenset({"model", "revision", *map(_option, (*_MODELS, *PATH_ARGUMENTS))})


@dataclass
class _Listing:
    """Files as they are now."""

    digest: str
    has_weights: bool
    changed_s: float  # when one of them was last changed or put in its place, seconds since the epoch


@dataclass(frozen=True)
class Settings:
    """What of the identity is known before anything is loaded, by the names that users type."""

    fields: Mapping[str, str]
    unclassified: Mapping[str, str]  # variables of which nobody has judged whether they change KV


def settings(read: Callable[[str], Any]) -> Settings:
    """The arguments and the environment of this process.

    To be called before SGLang loads the model: what it finds out then it puts into its environment, too.

    Args:
        read: value of a resolved argument of SGLang by its name.
    """
    fields = {_option(name): _argument(name, read(name)) for name in ARGUMENTS}
    fields |= {_option(name): str(read(name)) for name in ("page_size", "tp_size")}
    counting, unclassified = _environment()
    versions = {f"version of {name}": _version(name) for name in ("sglang", "torch", "transformers")}
    return Settings(
        {name: value for name, value in {**fields, **counting, **versions}.items() if value}, unclassified
    )


def model_identity(
    read: Callable[[str], Any],
    model_path: str,
    revision: str | None,
    *,
    shared: bool = False,
    at_start: Settings | None = None,
    pool: Mapping[str, str] | None = None,
    started_s: float | None = None,
) -> Identity:
    """What stands for the model and how its KV is computed.

    Every rank that reads the same files gets the same identity, now and after a restart, unless it has a
    nonce.

    Args:
        read: value of a resolved argument of SGLang by its name.
        model_path: what SGLang loaded: a directory, a file or the id of a hub repository.
        revision: of the repository.
        shared: for what other machines find as well: equal wherever the same files lie, however old they are
            there. It reads all of the weights, once on each machine (``file_contents``).
        at_start: what ``settings`` said before the model was loaded; default: what it says now.
        pool: what the device pool adds.
        started_s: since when files must not have changed, seconds since the epoch; default: the start of this
            process, which loaded the weights some time after.
    """
    if started_s is None:
        started_s = psutil.Process().create_time()
    at_start = at_start or settings(read)
    fields = {"model": _without_secrets(_absolute(model_path))}
    if revision:
        fields["revision"] = revision
    fields |= at_start.fields
    if shared:
        fields = {name: value for name, value in fields.items() if name not in _PLACES}
    reasons = _unknowable(read)
    for name, source in _sources(read, model_path, revision).items():
        if source is None:
            reasons.append(f"the files of {name} are not on this machine")
            continue
        try:
            listing = _list_contents(source) if shared else _list_files(source)
        except OSError as error:
            reasons.append(f"the files of {name} cannot be read: {error}")
            continue
        place = "" if shared else f"{_without_secrets(str(source))} "
        fields[f"files of {name}"] = place + listing.digest
        if name == "model" and not listing.has_weights:
            reasons.append(f"{source} holds no weights")
        if listing.changed_s > started_s:
            reasons.append(f"{source} has changed since this process started")
    if reasons:
        fields["weights"] = _without_secrets(f"not told by files ({'; '.join(reasons)})")
    return Identity(fields, pool or {}, at_start.unclassified, secrets.token_hex(16) if reasons else "")


def _sources(read: Callable[[str], Any], model_path: str, revision: str | None) -> dict[str, Path | None]:
    """Where the files lie that are loaded, by what they are; None: not on this machine."""
    sources = {"model": find_local(model_path, revision, read("download_dir"))}
    if read("model_path") != model_path:  # an adapter whose base SGLang loads as the model
        sources["--model-path"] = find_local(read("model_path"), read("revision"), read("download_dir"))
    draft = read("speculative_draft_model_path")
    if draft and draft != read("model_path"):  # layers for drafts are in the model's own files
        of_draft = read("speculative_draft_model_revision")
        sources["the draft model"] = find_local(draft, of_draft, read("download_dir"))
    # Adapters that are named at launch keep their id over restarts, and SGLang keys their KV by it.
    for adapter in read("lora_paths") or ():
        sources[f"lora {adapter.lora_id}"] = find_local(adapter.lora_path)
    for name in PATH_ARGUMENTS:
        if read(name):
            sources[_option(name)] = find_local(str(read(name)))
    return sources


def notes(identity: Identity, where: str) -> list[str]:
    """What its owner should know: whom this KV is lost to.

    Args:
        where: it is written, e.g. ``to SSD``.
    """
    found = []
    if identity.nonce:
        weights = identity.settings["weights"]
        found.append(
            f"KV that this process writes {where} will not be found by another one: weights {weights}"
        )
    if identity.unclassified:
        names = ", ".join(identity.unclassified)
        found.append(
            f"whether {names} changes KV is not known: without it, or with another value, what this process "
            f"writes {where} will not be found"
        )
    return found


def describe(model_path: str, dtype: object, tokens_per_block: int, tp_rank: int, tp_size: int) -> str:
    """One line for people about whose KV a store holds."""
    kind = str(dtype).removeprefix("torch.")
    model = _without_secrets(model_path)
    return f"{model}, {kind}, blocks of {tokens_per_block} tokens, TP rank {tp_rank} of {tp_size}"


def find_local(source: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """Where a model's files are: the path itself, or the snapshot of a hub repository that was downloaded.

    Never asks the network. The path of a snapshot contains its commit.
    """
    if os.path.exists(source):
        return Path(source).absolute()
    from huggingface_hub import snapshot_download

    # In the order in which SGLang looks for weights.
    for cache in dict.fromkeys((download_dir, None)):
        try:
            return Path(snapshot_download(source, revision=revision, cache_dir=cache, local_files_only=True))
        except (OSError, ValueError):  # not downloaded; not an id of a repository
            continue
    return None


def _unknowable(read: Callable[[str], Any]) -> list[str]:
    """Why the weights of this process are not, or not only, what the model's files hold."""
    reasons = []
    for name in ("load_format", "speculative_draft_load_format"):
        load_format = getattr(read(name), "value", read(name))
        if load_format not in FILE_FORMATS and (load_format is not None or name == "load_format"):
            reasons.append(f"{_option(name)} {load_format}")
    if read("weight_cache_mode") != "off":
        reasons.append("--weight-cache-mode: the weights are another process's")
    if read("checkpoint_engine_wait_weights_before_ready"):
        reasons.append("the weights come from a checkpoint engine")
    if read("quantize_and_serve"):
        reasons.append("--quantize-and-serve: the scales are computed at every start")
    return reasons


def _list_files(source: Path) -> _Listing:
    paths = sorted(_relevant_files(source))
    hashed = hashlib.blake2b(digest_size=16)
    for path in paths:
        status = path.stat()
        entry: tuple[object, ...]
        if path.suffix in _HASHED_SUFFIXES:
            entry = (hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),)
        else:
            entry = (status.st_size, status.st_mtime_ns, _sample(path, status.st_size))
        hashed.update(_text([str(path.relative_to(source.parent)), *entry]).encode() + b"\n")
    return _listing(source, paths, hashed.hexdigest())


def _list_contents(source: Path) -> _Listing:
    """The same by what is in the files, of those alone that hold weights, settings or code."""
    kept = _WEIGHT_SUFFIXES | _HASHED_SUFFIXES
    paths = sorted(path for path in _relevant_files(source) if path.suffix in kept)
    root = source if source.is_dir() else source.parent
    hashed = hashlib.blake2b(digest_size=16)
    for path, content in zip(paths, sha256_of(paths), strict=True):
        hashed.update(_text([str(path.relative_to(root)), content]).encode() + b"\n")
    return _listing(source, paths, hashed.hexdigest())


def _listing(source: Path, paths: Sequence[Path], digest: str) -> _Listing:
    """SGLang may have downloaded them while it started: what the hub's cache names by its contents may be
    young, and is what was loaded all the same."""
    changed_s = 0.0
    others = [path for path in paths if not is_named_by_contents(path)]
    if others or not paths:
        # Also of the directory and of links: renamed or pointed elsewhere, they lead to older files.
        links = [folder for folder in source.parents if folder.is_symlink()]
        ways = [path.lstat().st_ctime for path in (source, *links, *others)]
        changed_s = max(ways + [path.stat().st_ctime for path in others])
    return _Listing(digest, any(path.suffix in _WEIGHT_SUFFIXES for path in paths), changed_s)


def _relevant_files(source: Path) -> Iterable[Path]:
    if not source.is_dir():
        # One file of several: weights-00001-of-00003.gguf
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", source.stem)
        shards = source.parent.glob(f"{glob.escape(stem)}-*-of-*{source.suffix}")
        yield from {source, *shards} if stem != source.stem else {source}
        return

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(source, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix not in _IRRELEVANT_SUFFIXES and path.is_file():
                yield path


def _sample(path: Path, size: int) -> str:
    """Digest of pieces from the first to the last byte of a file."""
    hashed = hashlib.blake2b(digest_size=16)
    last = max(0, size - _SAMPLE_BYTES)
    with path.open("rb", buffering=0) as file:
        for number in range(_SAMPLES):
            file.seek(last * number // (_SAMPLES - 1))
            hashed.update(file.read(_SAMPLE_BYTES))
    return hashed.hexdigest()


def _environment() -> tuple[dict[str, str], dict[str, str]]:
    """The variables that are set and change KV, and those that nobody has classified."""
    declared = declared_variables()
    judged = variables()
    counting, unclassified = {}, {}
    for name, text in sorted(environment().items()):
        field = declared.get(name)
        if name in judged:
            value = _value_of(field, text) if judged[name] else ""
            if value:
                counting[name] = _without_secrets(value)
        elif _may_be_read(name, field):
            unclassified[name] = digest(text)  # it may be anything
    return counting, unclassified


def _may_be_read(name: str, field: Any) -> bool:
    """Whether a variable that we do not know can be one that a forward pass reads."""
    if _SECRET.search(name) or (field is not None and field.secret):
        return False
    return field is not None or (name.startswith("SGLANG_") and not _SERVICE_ADDRESS.search(name))


def _value_of(field: Any, text: str) -> str:
    """A variable's value as SGLang understands it; empty if that is what it is without the variable."""
    if field is None:
        return text
    try:
        value = field.get()
    except Exception:  # whatever SGLang makes of it
        return text
    return "" if not callable(field.default) and value == field.default else _text(value)


def _argument(name: str, value: object) -> str:
    """An argument's value as text; empty if it is not set."""
    if value is None or value is False or value in ("", "{}", "[]", [], {}, ()):
        return ""
    text = value if isinstance(value, str) else _text(value)
    if name == "model_path":
        text = _absolute(text)
    return digest(text) if name in _DIGESTED_ARGUMENTS else _without_secrets(text)


def _absolute(path: str) -> str:
    """The same text however a directory is named; ids of hub repositories as they are."""
    return str(Path(path).absolute()) if os.path.exists(path) else path


def _without_secrets(text: str) -> str:
    """Without passwords and signatures in URLs. Another password leads to the same model."""
    return _URL_SECRETS.sub("***", text)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # a source checkout on the path
        return "unknown"


def _text(value: object) -> str:
    """The same text for equal values in every process."""

    def other(value: object) -> object:
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    return json.dumps(value, sort_keys=True, default=other)
