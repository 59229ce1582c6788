"""Every setting there is, where it comes from, and what it may be.

This is the only module that reads a configuration file or the environment. A wrong setting ends here, with
one message that names the setting and the remedy.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Self

import psutil
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.paths import parse_path, reason, why_not_writable
from sglang_flexkv.common.remote_url import GIVES, RemoteUrl, parse_remote_url

logger = logging.getLogger(__name__)

GIB = 1024**3
ENV_PREFIX = "FLEXKV_"
_REMEMBERED_MIN = 1 << 16  # blocks of a remote store; each takes about a hundred bytes
_ENABLE_REMOTE = f"enable_remote: a remote store is named by its URL here, as 'remote'; {GIVES}"
_CONFIG_PATH_ENV = "FLEXKV_CONFIG_PATH"  # FlexKV's own name for the configuration file


class WritePolicy(Enum):
    """When a block is copied from the device to the CPU tier."""

    WRITE_THROUGH = "write_through"  # as soon as it is computed
    WRITE_THROUGH_SELECTIVE = "write_through_selective"  # at its second use
    WRITE_BACK = "write_back"  # when the device evicts it


class PrefetchPolicy(Enum):
    """How long a request waits in the queue for its blocks to come from SSD."""

    BEST_EFFORT = "best_effort"  # not at all: it takes what has arrived when it is scheduled
    TIMEOUT = "timeout"  # up to prefetch_timeout_s
    WAIT_COMPLETE = "wait_complete"  # until the last block is there or has failed


class EvictionPolicy(Enum):
    """Which blocks of a tier go first when it is full. Always leaf first, and never what is in use."""

    ADAPTIVE = "adaptive"  # those that, as far as was learned, come back least
    COST = "cost"  # those that are cheapest to compute again, times how often they were used
    LRU = "lru"  # the least recently used
    LFU = "lfu"  # the least often used
    SLRU = "slru"  # those that were never used again, then the least recently used
    S3FIFO = "s3fifo"  # new ones have to prove themselves in a tenth of the tier
    FIFO = "fifo"  # the oldest


class LoadPolicy(Enum):
    """What to do with a hit that a lower tier holds."""

    AUTO = "auto"  # load as much of it as brings the first token soonest, by measured speeds
    LOAD = "load"  # load all of it
    RECOMPUTE = "recompute"  # load nothing: the tiers are only filled


class IoEngine(Enum):
    AUTO = "auto"
    IO_URING = "io_uring"
    THREADS = "threads"


class SsdMismatch(Enum):
    """What to do with SSD files that hold another model's cache, or have another format."""

    REFUSE = "refuse"  # do not start
    FRESH = "fresh"  # give up what they hold


class Admission(Enum):
    """Which blocks are worth a place in a lower tier."""

    ALL = "all"
    REUSE = "reuse"  # those that came a second time, or were loaded from the CPU tier


class RemoteCompression(Enum):
    """Whether what is stored remotely is compressed. No word is ``off`` or ``on``: YAML's booleans."""

    NONE = "none"
    AUTO = "auto"  # while the link is so slow that it pays
    ALWAYS = "always"


def _split_dirs(value: object) -> object:
    """FlexKV writes several directories as one string with ``;`` between them."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(parse_path(part) for part in value.split(";") if part.strip())
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, (str, Path)) for part in value):
        raise ValueError(f"must be a directory, or several with ';' between them (got {value!r})")
    return tuple(parse_path(part) for part in value if is_set(str(part)))


def _parse_file(value: object) -> object:
    return parse_path(value) if isinstance(value, (str, Path)) else value


def _parse_remote(value: object) -> object:
    if not isinstance(value, str):
        if value is None or isinstance(value, RemoteUrl):
            return value
        raise ValueError(f"must be the URL of a store; {GIVES}")
    return parse_remote_url(value) if is_set(value) else None


# What is wrong with a URL is said without it: it may hold a password.
Remote = Annotated[RemoteUrl | None, BeforeValidator(_parse_remote)]
Directories = Annotated[tuple[Path, ...], BeforeValidator(_split_dirs)]


def _writable_file(path: Path | None) -> Path | None:
    """Refuses early what could not be written at the very end. Each rank adds its name to the file's."""
    if path is not None and (why := why_not_writable(path)):
        raise ValueError(f"{path} {why}")
    return path


TraceFile = Annotated[Path | None, BeforeValidator(_parse_file), AfterValidator(_writable_file)]


class CheckedSettings(BaseModel):
    """Frozen settings whose errors are ConfigErrors in the user's words."""

    # An infinite size passes every lower bound and fails much later.
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(type(self), error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML's ``yes`` and ``on`` are 1 to pydantic; as a size that is hardly meant."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must be a value, not true or false (got {value})")
        return value


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """One line per problem: the setting, what is wrong, and what to write instead."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, model.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(model.model_fields)}"
            lines.append(f"unknown setting {name!r}; {hint}")
        elif problem["type"] == "value_error":
            lines.append(f"{name}: {problem['ctx']['error']}" if name else str(problem["ctx"]["error"]))
        elif problem["type"] == "missing":
            lines.append(f"{name}: is missing and has no default; give it")
        else:
            wrong = problem["msg"].replace("Input should be", "must be")
            lines.append(f"{name}: {wrong} (got {problem['input']!r})")
    return "; ".join(lines)


class CacheConfig(CheckedSettings):
    """Sizes of the tiers in blocks, as the engine takes them."""

    tokens_per_block: int = Field(default=16, gt=0)
    enable_cpu: bool = True  # FlexKV's programs set this: they run as they are
    num_cpu_blocks: int = Field(default=1000, gt=0)
    enable_ssd: bool = False
    num_ssd_blocks: int = Field(default=0, ge=0)
    cpu_eviction_policy: EvictionPolicy = EvictionPolicy.ADAPTIVE
    ssd_eviction_policy: EvictionPolicy = EvictionPolicy.ADAPTIVE
    ssd_cache_dir: Directories = ()
    ssd_on_mismatch: SsdMismatch = SsdMismatch.REFUSE
    ssd_admission: Admission = Admission.ALL
    ssd_write_limit_mb_s: float = Field(default=0.0, ge=0)  # MB (10^6 bytes) per second; 0: no limit
    enable_remote: bool = False
    remote: Remote = None  # a store below the other tiers, shared by servers
    num_remote_blocks: int = Field(default=1 << 16, gt=0)  # of it that this process remembers
    remote_admission: Admission = Admission.ALL
    remote_write_limit_mb_s: float = Field(default=0.0, ge=0)  # MB (10^6 bytes) per second; 0: no limit
    remote_timeout_s: float = Field(default=1.0, gt=0)  # that one call of it may take
    remote_compression: RemoteCompression = RemoteCompression.NONE
    lease_timeout_s: float = Field(default=60.0, gt=0)  # a task that is not launched by then is cancelled
    trace_file: TraceFile = None  # a timeline of transfers, written at the end, per rank
    copy_threads: int = Field(default=2, gt=0, le=64)
    io_engine: IoEngine = IoEngine.AUTO
    io_depth: int = Field(default=64, gt=0, le=4096)  # I/Os in flight, per SSD directory

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.enable_cpu:
            raise ValueError("enable_cpu: the CPU tier cannot be off, every other tier loads through it")
        if self.enable_remote:
            raise ValueError(_ENABLE_REMOTE)
        if self.enable_ssd and not (self.num_ssd_blocks and self.ssd_cache_dir):
            raise ValueError("enable_ssd needs num_ssd_blocks > 0 and ssd_cache_dir")
        return self


class FlexKVConfig(CheckedSettings):
    """What a user of the SGLang integration can set, in a file, in the environment, or not at all.

    Sizes are totals for this machine: ranks that run side by side share them.
    """

    cpu_cache_gb: float | None = Field(default=None, gt=0)  # GiB; none: a quarter of the free memory
    ssd_cache_gb: float = Field(default=0.0, ge=0)  # GiB over all directories; 0: no SSD tier
    ssd_cache_dir: Directories = ()
    ssd_on_mismatch: SsdMismatch = SsdMismatch.REFUSE
    ssd_admission: Admission = Admission.ALL
    ssd_write_limit_mb_s: float = Field(default=0.0, ge=0)  # MB (10^6 bytes) per second; 0: no limit
    remote: Remote = None  # a store below the other tiers, shared by servers
    remote_admission: Admission = Admission.ALL
    remote_write_limit_mb_s: float = Field(default=0.0, ge=0)  # MB (10^6 bytes) per second; 0: no limit
    remote_timeout_s: float = Field(default=1.0, gt=0)  # that one call of it may take
    remote_compression: RemoteCompression = RemoteCompression.NONE
    cpu_eviction_policy: EvictionPolicy = EvictionPolicy.ADAPTIVE
    ssd_eviction_policy: EvictionPolicy = EvictionPolicy.ADAPTIVE
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT
    prefetch_timeout_s: float = Field(default=3.0, gt=0)
    load_policy: LoadPolicy = LoadPolicy.AUTO
    copy_threads: int | None = Field(default=None, gt=0, le=64)  # per rank; none: by the CPU count
    io_engine: IoEngine = IoEngine.AUTO
    io_depth: int = Field(default=64, gt=0, le=4096)
    trace_file: TraceFile = None  # a timeline of transfers, written when the server stops

    @model_validator(mode="before")
    @classmethod
    def _by_flexkv_s_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "enable_remote" in values:
            raise ValueError(_ENABLE_REMOTE)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ssd_cache_gb > 0 and not self.ssd_cache_dir:
            raise ValueError("ssd_cache_gb is set but ssd_cache_dir is not: name the directory to use")
        if self.ssd_cache_dir and self.ssd_cache_gb == 0:
            raise ValueError("ssd_cache_dir is set but ssd_cache_gb is 0: say how much of it to use")
        return self

    @classmethod
    def load(cls, path: str | None) -> FlexKVConfig:
        """Settings from a YAML or JSON file (or FLEXKV_CONFIG_PATH), overridden by FLEXKV_<SETTING>.

        What is empty, in the file or in the environment, is not set.

        Raises:
            ConfigError: names the file or the variables, the setting, and what to write instead.
        """
        origin = "--flexkv-config-file" if path else _CONFIG_PATH_ENV
        path = path or os.environ.get(_CONFIG_PATH_ENV, "").strip()
        values = _read_file(path, origin) if path else {}
        # Names that are not known stay, and are refused, whatever their value.
        values = {
            name: value for name, value in values.items() if name not in cls.model_fields or is_set(value)
        }
        known = {f"{ENV_PREFIX}{name.upper()}": name for name in cls.model_fields}
        overrides = [variable for variable in known if is_set(os.environ.get(variable))]
        for variable in overrides:
            values[known[variable]] = os.environ[variable]
        _warn_of_misspelt_variables(known)
        try:
            return cls(**values)
        except ConfigError as error:
            sources = [f"in {path}"] if path else []
            sources += [f"in the environment ({', '.join(overrides)})"] if overrides else []
            raise ConfigError(f"FlexKV configuration {' and '.join(sources)}: {error}") from None

    def check_memory(self) -> None:
        """Raises ConfigError if the CPU tier is larger than the memory that can be used now."""
        available = available_memory_bytes()
        if self.cpu_cache_gb is not None and int(self.cpu_cache_gb * GIB) > available:
            raise ConfigError(
                f"cpu_cache_gb={self.cpu_cache_gb:g} asks for more than the {available / GIB:.1f} GiB of "
                "memory this machine has available; lower it"
            )

    def cache_config(
        self, *, block_bytes: int, tokens_per_block: int, num_ranks: int, ranks_per_copy: int = 1
    ) -> CacheConfig:
        """Sizes in blocks for one of the caches on this machine.

        Args:
            block_bytes: bytes a block takes in a tier, alignment included.
            num_ranks: processes on this machine.
            ranks_per_copy: of these that have one cache in common; 1: each has one with a shard of the KV.
        """
        # By ranks: a set of them that spans two machines has no copy in common beside others that have.
        share = Fraction(ranks_per_copy, num_ranks)
        cpu_bytes = int(self.cpu_cache_gb * GIB) if self.cpu_cache_gb else available_memory_bytes() // 4
        self.check_memory()
        num_cpu_blocks = int(cpu_bytes * share) // block_bytes
        if num_cpu_blocks == 0:
            asked = f"{self.cpu_cache_gb:g}" if self.cpu_cache_gb else f"{cpu_bytes / GIB:g} (the default)"
            raise ConfigError(
                f"cpu_cache_gb={asked} holds no block of {block_bytes} bytes per rank; raise it"
            )
        num_ssd_blocks = int(int(self.ssd_cache_gb * GIB) * share) // block_bytes
        if self.ssd_cache_gb > 0 and num_ssd_blocks < len(self.ssd_cache_dir):
            raise ConfigError(
                f"ssd_cache_gb={self.ssd_cache_gb:g} holds no block of {block_bytes} bytes per rank and "
                "directory; raise it"
            )
        # Copies compete with the model's own CPU threads; past four the memory bus is the limit.
        threads = self.copy_threads or min(4, max(1, (os.cpu_count() or 1) // num_ranks))
        return CacheConfig(
            tokens_per_block=tokens_per_block,
            num_cpu_blocks=num_cpu_blocks,
            enable_ssd=num_ssd_blocks > 0,
            num_ssd_blocks=num_ssd_blocks,
            cpu_eviction_policy=self.cpu_eviction_policy,
            ssd_eviction_policy=self.ssd_eviction_policy,
            ssd_cache_dir=self.ssd_cache_dir,
            ssd_on_mismatch=self.ssd_on_mismatch,
            ssd_admission=self.ssd_admission,
            ssd_write_limit_mb_s=self.ssd_write_limit_mb_s * float(share),
            remote=self.remote,
            num_remote_blocks=max(_REMEMBERED_MIN, 4 * (num_cpu_blocks + num_ssd_blocks)),
            remote_admission=self.remote_admission,
            remote_write_limit_mb_s=self.remote_write_limit_mb_s * float(share),
            remote_timeout_s=self.remote_timeout_s,
            remote_compression=self.remote_compression,
            copy_threads=threads,
            io_engine=self.io_engine,
            io_depth=self.io_depth,
            trace_file=self.trace_file,
        )


def environment() -> Mapping[str, str]:
    """The environment of this process, for settings that are not ours."""
    return os.environ


def default_environment(**variables: str) -> None:
    """Sets those that are not set. For libraries that have settings nowhere else."""
    for name, text in variables.items():
        os.environ.setdefault(name, text)


def is_set(value: object) -> bool:
    """Whether a value says anything: not YAML's null, and no empty text."""
    return bool(value.strip()) if isinstance(value, str) else value is not None


def available_memory_bytes() -> int:
    """Memory that can be used now: what the machine has free, or what the container's limit leaves."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def overcommit_is_strict() -> bool:
    """Whether the kernel counts memory when it is mapped, and refuses what there is not."""
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


def _warn_of_misspelt_variables(known: Iterable[str]) -> None:
    """Only a warning: FlexKV has variables of its own with this prefix."""
    known = {_CONFIG_PATH_ENV, *known}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1, cutoff=0.9)
            if close:
                logger.warning("%s is not a setting and was ignored; did you mean %s?", variable, close[0])


def _read_file(path: str, origin: str) -> dict[str, Any]:
    try:
        file = parse_path(path)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None
    try:
        if file.is_fifo():  # a pipe can be read once, and every process of a server reads the settings
            raise ConfigError(f"the FlexKV configuration file {path} is a pipe; give {origin} a file")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the FlexKV configuration file {path}: {reason(error)}; check {origin}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"cannot read the FlexKV configuration file {path}: it is not UTF-8 text; check {origin}"
        ) from None
    try:
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    # Of values that look like a date, YAML lets Python's own errors through.
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        where = " ".join(str(error).split())  # YAML draws the place over several lines
        raise ConfigError(
            f"the FlexKV configuration file {path} is not valid {kind}: {where}; correct that place"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"the FlexKV configuration file {path} must hold settings as 'name: value', "
            f"not a {type(values).__name__}"
        )
    # Names that YAML reads as numbers or booleans are unknown settings like others.
    return {str(name): value for name, value in values.items()}
