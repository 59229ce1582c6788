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
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sglang_flexkv.common.config import (
    GIB,
    Admission,
    EvictionPolicy,
    FlexKVConfig,
    WritePolicy,
)
from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.common.kv_group import window_share
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
# What saves less than this share of the prefill is not worth a tier.
_WORTH_MIN = 0.001
# To compare configurations by one number: memory costs about as much as so many times of SSD.
_SSD_PER_MEMORY_PRICE = 16

# Architectures of which SGLang keeps the layers with a sliding window in a pool of their own, and whose
# config.json lists the kinds of its layers. Other models keep all tokens in all layers, whatever they attend
# to; but for those below.
WINDOWS_BY_LAYER = frozenset(
    {"GptOssForCausalLM", "GraniteMoeSWAForCausalLM", "GraniteSWAForCausalLM", "LagunaForCausalLM"}
)
# Of this one all but every fourth layer attend to a chunk.
CHUNKS = "Llama4ForConditionalGeneration"
# What they keep for a token in a window differs from layer to layer, or their windows are not in its terms.
OTHER_WINDOWS = frozenset(
    {
        "BeamForCausalLM",
        "DeepseekV4ForCausalLM",
        "DiffusionGemmaForBlockDiffusion",
        "EmbeddingGemma2Model",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "IQuestQ1ForCausalLM",
        "InklingForConditionalGeneration",
        "MellumForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiMoV2ForCausalLM",
        "MuseGlimmerForCausalLM",
        "MuseGlimmerForConditionalGeneration",
        "Step3p5ForCausalLM",
        "Step3p7ForConditionalGeneration",
        "UnlimitedOCRForCausalLM",
    }
)
# Of the tokens that full attention has room for on the device, windows have room for so many (SGLang's
# --swa-full-tokens-ratio).
_WINDOWS_ON_DEVICE = 0.8

_INDEX_VALUES_PER_SCALE, _INDEX_SCALE_BYTES = 128, 4

# No figure of a model is larger, and no config.json.
_FIGURE_MAX, _CONFIG_BYTES_MAX = 10**8, 16 << 20

# Bytes of a number.
_DTYPES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


class PlanError(FlexKVError, ValueError):
    """A plan cannot be made from what was given. Says what to give instead."""


@dataclass(frozen=True)
class KvShape:
    """What a token takes in the cache."""

    bytes_per_token: int  # of one rank, over all layers that keep all tokens
    ranks: int = 1
    window_bytes_per_token: int = 0  # the same over the layers that keep a sliding window
    window_tokens: int = 0  # that they keep
    is_latent: bool = False  # all ranks hold the same, of which the tiers of a machine have one copy

    @classmethod
    def of_model(cls, path: Path, tp: int = 1, dtype: str | None = None) -> KvShape:
        """From a Hugging Face ``config.json`` or the directory that holds it.

        Args:
            tp: tensor-parallel size. On the device MLA and surplus ranks hold copies, as in SGLang.
            dtype: of the KV; none: that of the model.

        Raises:
            PlanError: the file cannot be read or lacks something.
        """
        file, config = _read_model(path)

        def figure(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if type(value) is not int or not 0 < value <= _FIGURE_MAX:
                raise PlanError(f"{file} has no usable {name}; give --kv-bytes-per-token instead of --model")
            return value

        name = dtype or config.get("torch_dtype") or config.get("dtype")
        if not isinstance(name, str) or name not in _DTYPES:
            raise PlanError(
                f"the dtype of the KV is unknown ({reprlib.repr(name)}); "
                f"give --kv-dtype: {', '.join(_DTYPES)}"
            )
        layers, heads = figure("num_hidden_layers"), figure("num_attention_heads")
        if heads % tp:
            raise PlanError(
                f"{heads} attention heads ({file}) cannot be split over {tp} ranks; "
                "give a --tp that divides them"
            )
        if config.get("kv_lora_rank"):
            numbers = figure("kv_lora_rank") + figure("qk_rope_head_dim")
        else:
            kv_heads = figure("num_key_value_heads", heads)
            if kv_heads % tp and tp % kv_heads:
                raise PlanError(
                    f"{kv_heads} key-value heads ({file}) can neither be split over {tp} ranks nor copied to "
                    "as many ranks each; give another --tp"
                )
            head_size = figure("head_dim", figure("hidden_size", 1) // heads)
            numbers = 2 * max(1, kv_heads // tp) * head_size
        windowed, window_tokens = _windows(file, config, layers, figure)
        of_layer = numbers * _DTYPES[name]
        if config.get("index_topk"):  # DeepSeek's sparse attention keeps a key for its index, with scales
            size = figure("index_head_dim")
            of_layer += size + size // _INDEX_VALUES_PER_SCALE * _INDEX_SCALE_BYTES
        is_latent = bool(config.get("kv_lora_rank"))
        return cls(of_layer * (layers - windowed), tp, of_layer * windowed, window_tokens, is_latent)

    @classmethod
    def of_total(cls, bytes_per_token: int, tp: int = 1) -> KvShape:
        """From the bytes of a token over all ranks. Raises PlanError."""
        if bytes_per_token % tp:
            raise PlanError(
                f"{bytes_per_token} bytes over all ranks cannot be those of {tp} ranks, which hold equally "
                "much; correct --kv-bytes-per-token or --tp"
            )
        return cls(bytes_per_token // tp, tp)

    def block_bytes(self, tokens_per_block: int) -> int:
        """Of a block in a tier, in all copies, with what windows have there for each."""
        share = window_share(self.window_tokens, tokens_per_block) if self.window_tokens else 0.0
        return self._block_bytes(tokens_per_block, share) * self.tier_copies

    def device_block_bytes(self, tokens_per_block: int) -> int:
        """Of a block in the device's pools, over all ranks."""
        return self._block_bytes(tokens_per_block, _WINDOWS_ON_DEVICE) * self.ranks

    @property
    def tier_copies(self) -> int:
        """Of what one rank holds, in the tiers of a machine that has all ranks."""
        return 1 if self.is_latent else self.ranks

    def _block_bytes(self, tokens_per_block: int, share: float) -> int:
        per_token = self.bytes_per_token + self.window_bytes_per_token * share
        return math.ceil(per_token * tokens_per_block)


def _windows(
    file: Path, config: dict[str, Any], layers: int, figure: Callable[[str], int]
) -> tuple[int, int]:
    """How many layers keep a sliding window only, and how many tokens it has. Raises PlanError."""
    given = config.get("architectures")
    names = set(given) if isinstance(given, list) and all(isinstance(one, str) for one in given) else set()
    kinds = config.get("layer_types")
    kinds = kinds if isinstance(kinds, list) else []
    if names & OTHER_WINDOWS or "linear_attention" in kinds or config.get("hybrid_layer_pattern"):
        raise PlanError(
            f"{file} is of a model that keeps something else in some of its layers, which is not counted "
            "here; give --kv-bytes-per-token instead of --model"
        )
    if CHUNKS in names:
        return layers - layers // 4, figure("attention_chunk_size")
    if not names & WINDOWS_BY_LAYER or not config.get("sliding_window"):
        return 0, 0
    if len(kinds) != layers:
        raise PlanError(f"{file} has no usable layer_types; give --kv-bytes-per-token instead of --model")
    return kinds.count("sliding_attention"), figure("sliding_window")


def _read_model(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the figures of a model, and what is in it. Raises PlanError."""
    file = path
    try:
        file = path / "config.json" if path.is_dir() else path
        with file.open("rb") as opened:
            text = opened.read(_CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}; check --model") from None
    if len(text) > _CONFIG_BYTES_MAX:
        raise PlanError(f"{file} is too large for a config.json; check --model")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{file} is not JSON ({error}); check --model") from None
    # Models that also see or hear keep the language model's figures in a section.
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = {**config["text_config"], "architectures": config.get("architectures")}
    if not isinstance(config, dict):
        raise PlanError(
            f"{file} is a JSON {type(config).__name__}, not the config.json of a model; check --model"
        )
    return file, config


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

    @property
    def tier_hit_rate(self) -> float:
        """Share of the input tokens that come from the tiers."""
        return self.cpu_hit_rate + self.ssd_hit_rate


@dataclass(frozen=True)
class Cap:
    """A limit that was given and costs something."""

    option: str  # of the command line
    enough_gib: float  # of that tier: room for every block of the trace
    mean_saving_s: float  # with so much


@dataclass(frozen=True)
class Plan:
    """What is recommended, and what else was looked at."""

    recommended: Candidate | None  # None: no tier is worth it
    best: Candidate  # the largest saving within the limits, whatever it costs
    limitless: Candidate  # a CPU tier with room for every block of the trace
    grid: tuple[Candidate, ...]  # sizes with the policies that save most, cheapest first
    caps: tuple[Cap, ...]
    # Seconds that a token takes: to compute, to load from the CPU tier, and from SSD.
    compute_s: float
    cpu_load_s: float
    ssd_load_s: float
    mean_prefill_s: float  # of a request without any tier, with what the device holds

    def why_nothing(self) -> str:
        """Why no tier is recommended, in words that continue a sentence."""
        if self.limitless.tier_hit_rate == 0 and self.limitless.device_hit_rate > 0:
            return "whatever comes again is still in the GPUs' own cache"
        if self.limitless.tier_hit_rate == 0:
            return "no prompt begins with a whole block that an earlier one began with"
        if self.cpu_load_s >= self.compute_s:
            return "a token takes longer to load from the CPU tier than to compute"
        limits = "even with room for everything it" if not self.caps else "within the given limits it"
        return f"{limits} would save less than {_WORTH_MIN:.1%} of the prefill"

    def why_less(self, candidate: Candidate) -> str | None:
        """Why a configuration saves less than another one that hits less, as far as the figures that are
        shown tell; None: there is no such one."""

        def shown(one: Candidate) -> tuple[float, float]:
            return round(one.tier_hit_rate, 3), round(one.mean_saving_s, 4)

        hits, saving_s = shown(candidate)
        if not any(shown(other)[0] < hits and shown(other)[1] > saving_s for other in self.grid):
            return None
        if self.cpu_load_s >= self.compute_s:
            return "every hit costs time: loading a token takes longer than computing it"
        if self.ssd_load_s >= self.compute_s:
            return "hits on SSD cost time: loading a token from there takes longer than computing it"
        return "more of the hits are on SSD, where each saves less than in memory"

    def settings(self, ssd_dirs: Iterable[Path] = ()) -> dict[str, Any]:
        """As ``FlexKVConfig`` takes them.

        Raises:
            PlanError: no tier is recommended.
            ConfigError: an SSD tier has no directory, for instance.
        """
        chosen = self._worthwhile()
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
        chosen = self._worthwhile()
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

    def _worthwhile(self) -> Candidate:
        if self.recommended is None:
            raise PlanError(f"there is no configuration to write: {self.why_nothing()}")
        return self.recommended

    def as_dict(self) -> dict[str, Any]:
        reasons = {
            "why_nothing": self.why_nothing() if self.recommended is None else None,
            "grid": [{**asdict(one), "why_less": self.why_less(one)} for one in self.grid],
        }
        return {**asdict(self), **reasons}


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
        """Of a tier."""
        return int(gib * GIB) // self.block_bytes

    @property
    def blocks_on_device(self) -> int:
        return int(self.hardware.gpu_kv_gib * GIB) // self.shape.device_block_bytes(
            self.trace.tokens_per_block
        )

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

    @property
    def compute_s(self) -> float:
        """What a token takes to compute."""
        return 1 / self.hardware.prefill_tokens_s

    @property
    def cpu_load_s(self) -> float:
        """What a token takes to load from the CPU tier: all ranks load side by side. A window comes once with
        each prompt, and is not counted."""
        return self.shape.bytes_per_token / (self.hardware.pcie_gb_s * 1e9)

    @property
    def ssd_load_s(self) -> float:
        """What a token takes to load from SSD, by way of the CPU tier."""
        all_bytes = float(self.shape.bytes_per_token * self.shape.tier_copies)
        return self.cpu_load_s + all_bytes / (self.hardware.ssd_read_gb_s * 1e9)

    def _saving_s(self, replay: Replay) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of each request: computing what was hit, less loading it. Negative where loading is slower."""
        return replay.cpu_hit_tokens * (self.compute_s - self.cpu_load_s) + replay.ssd_hit_tokens * (
            self.compute_s - self.ssd_load_s
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
    ssd_sizes = bench.sizes(hardware.ssd_gib, _SSD_SIZES)
    if hardware.ssd_gib and not ssd_sizes:
        raise PlanError(
            f"{hardware.ssd_gib:g} GiB hold no block of {bench.block_bytes:,} bytes; raise --ssd-gib, or "
            "leave it out"
        )
    device_blocks = min(bench.blocks_on_device, trace.num_blocks)
    base = TierSetup(trace.num_blocks, device_blocks=device_blocks)
    everything = bench.try_out(base)
    mean_prefill_s = (
        trace.input_tokens / trace.num_requests * (1 - everything.device_hit_rate) * bench.compute_s
    )
    worth_s = _WORTH_MIN * mean_prefill_s
    setups = [
        replace(base, cpu_blocks=cpu, ssd_blocks=ssd)
        for cpu in cpu_sizes
        # What passes through memory lands on SSD: one that is no larger holds nothing else.
        for ssd in (0, *(size for size in ssd_sizes if size > cpu))
    ]
    grid = {setup: bench.try_out(setup) for setup in setups}
    if _most(grid) >= worth_s:
        chosen = _smallest_good(grid)
    else:  # of what hits nothing, the largest shows best whether another policy does better
        chosen = max(grid, key=lambda setup: (grid[setup].mean_saving_s, grid[setup].price))
    if everything.mean_saving_s >= worth_s:
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
    recommended = None
    if _most(grid) >= worth_s:
        careful = _best_admission(bench, chosen) if chosen.ssd_blocks else chosen
        recommended = grid[chosen] = bench.try_out(careful)
        chosen = careful
    return Plan(
        recommended=recommended,
        best=max(grid.values(), key=lambda candidate: candidate.mean_saving_s),
        limitless=everything,
        grid=tuple(sorted(grid.values(), key=lambda candidate: candidate.price)),
        caps=_caps(bench, chosen, worth_s),
        compute_s=bench.compute_s,
        cpu_load_s=bench.cpu_load_s,
        ssd_load_s=bench.ssd_load_s,
        mean_prefill_s=mean_prefill_s,
    )


def _caps(bench: _Bench, chosen: TierSetup, worth_s: float) -> tuple[Cap, ...]:
    """The limits that were given and without which, one at a time, clearly more would be saved."""
    hardware, num_blocks = bench.hardware, bench.trace.num_blocks
    saving_s = max(bench.try_out(chosen).mean_saving_s, 0.0)
    raised = []
    if bench.blocks_in(hardware.cpu_gib) < num_blocks:
        raised.append(("--cpu-gib", replace(chosen, cpu_blocks=num_blocks)))
    if hardware.ssd_gib and bench.blocks_in(hardware.ssd_gib) < num_blocks:
        raised.append(("--ssd-gib", replace(chosen, ssd_blocks=num_blocks)))
    caps = []
    for option, setup in raised:
        more_s = bench.try_out(setup).mean_saving_s
        if more_s >= max(worth_s, saving_s * (1 + _GIVEN_UP_MAX)):
            caps.append(Cap(option, num_blocks * bench.block_bytes / GIB, more_s))
    return tuple(caps)


def _most(grid: dict[TierSetup, Candidate]) -> float:
    return max(candidate.mean_saving_s for candidate in grid.values())


def _smallest_good(grid: dict[TierSetup, Candidate]) -> TierSetup:
    best_s = _most(grid)
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
    careful = replace(setup, ssd_admission=Admission.REUSE)
    now, other = bench.try_out(setup), bench.try_out(careful)
    loss_s = now.mean_saving_s - other.mean_saving_s
    fewer = other.ssd_written_gib <= (1 - _ADMISSION_WRITES_SAVED_MIN) * now.ssd_written_gib
    return careful if fewer and loss_s <= _ADMISSION_LOSS_MAX * abs(now.mean_saving_s) else setup
