"""What to configure for a trace on a machine: sizes and policies, and what they are worth.

The worth of a configuration is the prefill time it saves: of each request the tokens that come from the CPU
tier or from SSD would have to be computed again, and have to be loaded instead. The device's own cache is
simulated above the tiers, so what it holds counts for neither. Loading is taken to happen before the prefill
and not beside it, and nothing waits for anything else: what is saved under load is more, because then
computing is what requests wait for.

Only ``write_policy: write_through`` is simulated and recommended: whatever is computed reaches the CPU tier.
The other two depend on when the device evicts and re-reads its blocks, which a trace of prompts does not
tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sglang_flexkv.common.config import (
    GIB,
    EvictionPolicy,
    FlexKVConfig,
    ModelConfig,
    SsdAdmission,
    WritePolicy,
)
from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.replay.simulator import Replay, TierSetup, simulate
from sglang_flexkv.replay.trace import Trace

# Sizes that are tried: what is available, and so many halves of it.
_CPU_SIZES, _SSD_SIZES = 6, 4
# Less than this share of the best saving is given up for a smaller configuration.
_GIVEN_UP_MAX = 0.02
# Policies that save as much up to this share are equally good: the rest is noise of this trace.
_POLICY_NOISE = 0.01
# Admission on reuse is recommended if it costs at most this share of the saving ...
_ADMISSION_LOSS_MAX = 0.01
# ... and leaves at least this share of the writes out.
_ADMISSION_WRITES_SAVED_MIN = 0.2
# To compare configurations by one number: memory costs about as much as so many times of SSD.
_SSD_PER_MEMORY_PRICE = 16

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


class PlanError(FlexKVError, ValueError):
    """A plan cannot be made from what was given. Says what to give instead."""


@dataclass(frozen=True)
class KvShape:
    """What a token takes in the cache."""

    bytes_per_token: int  # of one rank, over all layers
    ranks: int = 1

    @classmethod
    def of_model(cls, path: Path, tp: int = 1, dtype: str | None = None) -> KvShape:
        """From a Hugging Face ``config.json`` or the directory that holds it.

        Args:
            tp: tensor-parallel size. MLA and surplus ranks hold copies, as in SGLang.
            dtype: of the KV; none: that of the model.

        Raises:
            PlanError: the file cannot be read or lacks something.
        """
        try:
            file = path / "config.json" if path.is_dir() else path
        except OSError as error:
            raise PlanError(f"{path} cannot be read: {error.strerror}; check --model") from None
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{file} cannot be read: {error.strerror}; check --model") from None
        except ValueError as error:
            raise PlanError(f"{file} is not JSON ({error}); check --model") from None
        # Models that also see or hear keep the language model's figures in a section.
        config = config.get("text_config", config) if isinstance(config, dict) else {}

        def figure(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if type(value) is not int or value <= 0:
                raise PlanError(f"{file} has no usable {name}; give --kv-bytes-per-token instead of --model")
            return value

        name = dtype or str(config.get("torch_dtype") or config.get("dtype"))
        if name not in _DTYPES:
            raise PlanError(f"the dtype of the KV is unknown ({name}); give --kv-dtype: {', '.join(_DTYPES)}")
        layers = figure("num_hidden_layers")
        if config.get("kv_lora_rank"):
            model = ModelConfig(
                num_layers=layers,
                num_kv_heads=1,
                head_size=figure("kv_lora_rank") + figure("qk_rope_head_dim"),
                use_mla=True,
                dtype=_DTYPES[name],
            )
        else:
            heads = figure("num_attention_heads")
            model = ModelConfig(
                num_layers=layers,
                num_kv_heads=max(1, figure("num_key_value_heads", heads) // tp),
                head_size=figure("head_dim", figure("hidden_size", 1) // heads),
                dtype=_DTYPES[name],
            )
        return cls(model.token_size_in_bytes, tp)

    @classmethod
    def of_total(cls, bytes_per_token: int, tp: int = 1) -> KvShape:
        """From the bytes of a token over all ranks."""
        return cls(-(-bytes_per_token // tp), tp)

    def block_bytes(self, tokens_per_block: int) -> int:
        """Over all ranks."""
        return self.bytes_per_token * tokens_per_block * self.ranks


@dataclass(frozen=True)
class Hardware:
    """The machine. Sizes are over all ranks, GiB; rates in 10^9 bytes."""

    gpu_kv_gib: float  # the device's KV pools; 0: the tiers see every request
    cpu_gib: float  # available to the CPU tier
    ssd_gib: float  # available to the SSD tier; 0: none
    pcie_gb_s: float  # between CPU memory and one GPU; each rank has its own
    ssd_read_gb_s: float  # of all directories together
    prefill_tokens_s: float  # that the model computes, over all ranks


@dataclass(frozen=True)
class Candidate:
    """A configuration and what it came to."""

    cpu_gib: float
    ssd_gib: float
    cpu_policy: str
    ssd_policy: str
    ssd_admission: str
    device_hit_rate: float  # shares of the input tokens
    cpu_hit_rate: float
    ssd_hit_rate: float
    mean_saving_s: float  # of the time to first token, per request
    p50_saving_s: float
    ssd_written_gib: float

    @property
    def price(self) -> float:
        """In GiB of memory."""
        return self.cpu_gib + self.ssd_gib / _SSD_PER_MEMORY_PRICE


@dataclass(frozen=True)
class Plan:
    """What is recommended, and what else was looked at."""

    recommended: Candidate
    best: Candidate  # the largest saving, whatever it costs
    grid: tuple[Candidate, ...]  # sizes with the recommended policies, cheapest first
    mean_prefill_s: float  # of a request without any tier, with what the device holds
    input_tokens_mean: float

    @property
    def worthwhile(self) -> bool:
        return self.recommended.mean_saving_s > 0

    def settings(self, ssd_dirs: Iterable[Path] = ()) -> dict[str, Any]:
        """As ``FlexKVConfig`` takes them. Raises ConfigError, if an SSD tier has no directory for
        instance."""
        chosen = self.recommended
        settings: dict[str, Any] = {
            "cpu_cache_gb": _rounded_up(chosen.cpu_gib),
            "cpu_eviction_policy": chosen.cpu_policy,
            "write_policy": WritePolicy.WRITE_THROUGH.value,
        }
        if chosen.ssd_gib:
            settings |= {
                "ssd_cache_gb": _rounded_up(chosen.ssd_gib),
                "ssd_cache_dir": [str(directory) for directory in ssd_dirs],
                "ssd_eviction_policy": chosen.ssd_policy,
                "ssd_admission": chosen.ssd_admission,
            }
        FlexKVConfig(**settings)
        return settings

    def write(self, path: Path, ssd_dirs: Iterable[Path] = ()) -> None:
        """Writes a configuration file. Raises PlanError or ConfigError."""
        chosen = self.recommended
        saved_ms = 1000 * chosen.mean_saving_s
        note = (
            f"# sglang-flexkv plan: {saved_ms:.1f} ms less to the first token on average,\n"
            f"# {chosen.cpu_hit_rate:.1%} of the input tokens from the CPU tier, "
            f"{chosen.ssd_hit_rate:.1%} from SSD\n"
        )
        text = note + yaml.safe_dump(self.settings(ssd_dirs), sort_keys=False)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise PlanError(f"{path} cannot be written: {error.strerror}; name another file") from None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worthwhile": self.worthwhile}


def _rounded_up(gib: float) -> float:
    """To a thousandth: what is written down must hold every block that was simulated."""
    return math.ceil(gib * 1000) / 1000


Progress = Callable[[str], None]  # is told what is tried next


class _Bench:
    """Tries setups on one trace."""

    def __init__(self, trace: Trace, shape: KvShape, hardware: Hardware, progress: Progress | None) -> None:
        self.trace, self.shape, self.hardware = trace, shape, hardware
        self.progress = progress
        self.block_bytes = shape.block_bytes(trace.tokens_per_block)
        self.tried: dict[TierSetup, Candidate] = {}

    def blocks_in(self, gib: float) -> int:
        return int(gib * GIB) // self.block_bytes

    def sizes(self, gib: float, count: int) -> list[int]:
        """What is tried of an available size, in blocks: more than the trace has makes no difference."""
        largest = min(self.blocks_in(gib), self.trace.num_blocks)
        return sorted({largest >> halves for halves in range(count)} - {0})

    def try_out(self, setup: TierSetup) -> Candidate:
        if setup not in self.tried:
            if self.progress is not None:
                self.progress(f"CPU {setup.cpu_blocks:,}, SSD {setup.ssd_blocks:,} blocks")
            self.tried[setup] = self._candidate(simulate(self.trace, setup))
        return self.tried[setup]

    def _candidate(self, replay: Replay) -> Candidate:
        saving_s = self._saving_s(replay)
        setup = replay.setup
        return Candidate(
            cpu_gib=setup.cpu_blocks * self.block_bytes / GIB,
            ssd_gib=setup.ssd_blocks * self.block_bytes / GIB,
            cpu_policy=setup.cpu_policy.value,
            ssd_policy=setup.ssd_policy.value,
            ssd_admission=setup.ssd_admission.value,
            device_hit_rate=replay.hit_rate(replay.device_hit_tokens),
            cpu_hit_rate=replay.hit_rate(replay.cpu_hit_tokens),
            ssd_hit_rate=replay.hit_rate(replay.ssd_hit_tokens),
            mean_saving_s=float(saving_s.mean()),
            p50_saving_s=float(np.median(saving_s)),
            ssd_written_gib=replay.ssd_admitted * self.block_bytes / GIB,
        )

    def _saving_s(self, replay: Replay) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of each request: computing what was hit, less loading it. Negative where loading is slower."""
        hardware, per_token = self.hardware, self.shape.bytes_per_token
        loaded = replay.cpu_hit_tokens + replay.ssd_hit_tokens
        return (
            loaded / hardware.prefill_tokens_s
            - loaded * per_token / (hardware.pcie_gb_s * 1e9)
            - replay.ssd_hit_tokens * per_token * self.shape.ranks / (hardware.ssd_read_gb_s * 1e9)
        )


def make_plan(trace: Trace, shape: KvShape, hardware: Hardware, progress: Progress | None = None) -> Plan:
    """Recommends the smallest configuration that saves nearly as much time as the best one.

    Sizes are tried first, with the default policies; then the policies at the size that was found; then, if
    other policies turned out better, the sizes again.

    Raises:
        PlanError: the memory that is available holds no block.
    """
    bench = _Bench(trace, shape, hardware, progress)
    cpu_sizes = bench.sizes(hardware.cpu_gib, _CPU_SIZES)
    if not cpu_sizes:
        raise PlanError(
            f"{hardware.cpu_gib:g} GiB hold no block of {bench.block_bytes:,} bytes; raise --cpu-gib, or "
            "check --tokens-per-block and the model"
        )
    ssd_sizes = bench.sizes(hardware.ssd_gib, _SSD_SIZES) if hardware.ssd_gib else []
    device_blocks = min(bench.blocks_in(hardware.gpu_kv_gib), trace.num_blocks)
    base = TierSetup(cpu_sizes[0], device_blocks=device_blocks)
    setups = [
        replace(base, cpu_blocks=cpu, ssd_blocks=ssd)
        for cpu in cpu_sizes
        # What passes through memory lands on SSD: one that is no larger holds nothing else.
        for ssd in (0, *(size for size in ssd_sizes if size > cpu))
    ]
    grid = {setup: bench.try_out(setup) for setup in setups}
    chosen = _smallest_good(grid)
    policies = _best_policies(bench, chosen)
    if policies != chosen:
        grid = {}
        for setup in setups:
            other = replace(
                setup,
                cpu_policy=policies.cpu_policy,
                ssd_policy=policies.ssd_policy if setup.ssd_blocks else setup.ssd_policy,
            )
            grid[other] = bench.try_out(other)
        chosen = _smallest_good(grid)
    if chosen.ssd_blocks:
        chosen = _best_admission(bench, chosen)
    first = next(iter(bench.tried.values()))
    tokens = trace.input_tokens / trace.num_requests
    return Plan(
        recommended=bench.try_out(chosen),
        best=max(grid.values(), key=lambda candidate: candidate.mean_saving_s),
        grid=tuple(sorted(grid.values(), key=lambda candidate: candidate.price)),
        mean_prefill_s=tokens * (1 - first.device_hit_rate) / hardware.prefill_tokens_s,
        input_tokens_mean=tokens,
    )


def _smallest_good(grid: dict[TierSetup, Candidate]) -> TierSetup:
    best_s = max(candidate.mean_saving_s for candidate in grid.values())
    enough_s = best_s - _GIVEN_UP_MAX * abs(best_s)
    good = [setup for setup, candidate in grid.items() if candidate.mean_saving_s >= enough_s]
    return min(good, key=lambda setup: grid[setup].price)


def _best_policies(bench: _Bench, setup: TierSetup) -> TierSetup:
    """The setup with the policies that save most, tier by tier. Of equally good ones the present is kept, or
    lru is taken, which everybody knows."""
    policies = list(dict.fromkeys((setup.cpu_policy, EvictionPolicy.LRU, *EvictionPolicy)))
    setup = _first_good(bench, [replace(setup, cpu_policy=policy) for policy in policies])
    if setup.ssd_blocks:
        policies = list(dict.fromkeys((setup.ssd_policy, EvictionPolicy.LRU, *EvictionPolicy)))
        setup = _first_good(bench, [replace(setup, ssd_policy=policy) for policy in policies])
    return setup


def _first_good(bench: _Bench, setups: list[TierSetup]) -> TierSetup:
    savings_s = [bench.try_out(setup).mean_saving_s for setup in setups]
    enough_s = max(savings_s) - _POLICY_NOISE * abs(max(savings_s))
    return next(setup for setup, saving_s in zip(setups, savings_s, strict=True) if saving_s >= enough_s)


def _best_admission(bench: _Bench, setup: TierSetup) -> TierSetup:
    careful = replace(setup, ssd_admission=SsdAdmission.REUSE)
    now, other = bench.try_out(setup), bench.try_out(careful)
    loss_s = now.mean_saving_s - other.mean_saving_s
    fewer = other.ssd_written_gib <= (1 - _ADMISSION_WRITES_SAVED_MIN) * now.ssd_written_gib
    return careful if fewer and loss_s <= _ADMISSION_LOSS_MAX * abs(now.mean_saving_s) else setup
