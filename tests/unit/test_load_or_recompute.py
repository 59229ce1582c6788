"""The decision how much of a hit to load, for machines of any speed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sglang_flexkv.cache.load_or_recompute import LinkSpeed, LoadOrRecompute, PrefillCost, Prompt
from sglang_flexkv.common.config import LoadPolicy
from sglang_flexkv.common.lower_tier import CPU

SSD = 1
BLOCK_BYTES, BLOCK_TOKENS = 1 << 20, 16
MB = 1e6


def decision(
    *,
    tokens_per_s: float = 10_000,
    to_device: float = 20_000 * MB,
    from_ssd: float = 3_000 * MB,
    policy: LoadPolicy = LoadPolicy.AUTO,
) -> LoadOrRecompute:
    """One that has seen such a machine. Attention costs nothing."""
    out = LoadOrRecompute(policy, block_bytes=BLOCK_BYTES, tokens_per_block=BLOCK_TOKENS)
    for i in range(1, 40):
        start, tokens = 300 * (i % 7), 1000 + 100 * (i % 5)
        out.prefill.observe([(start, start + tokens)], tokens / tokens_per_s)
        for link, speed in ((out.to_device, to_device), (out.from_tier[SSD], from_ssd)):
            link.observe(speed * i, float(i))
    return out


def prompt(cpu: int, ssd: int = 0, *, more_tokens: int = 100, device: int = 0, queued: int = 0) -> Prompt:
    tiers = np.array([CPU] * cpu + [SSD] * ssd, np.uint8)
    return Prompt(tiers, device, device + (cpu + ssd) * BLOCK_TOKENS + more_tokens, {SSD: queued})


def test_everything_is_loaded_where_loading_is_fast() -> None:
    assert decision().blocks_to_load(prompt(500)) == 500
    assert decision().blocks_to_load(prompt(200, 300)) == 500
    assert decision().blocks_to_load(prompt(0)) == 0


def test_nothing_is_loaded_where_computing_is_faster_by_far() -> None:
    # A block takes 10 ms to read and 0.16 ms to compute.
    assert decision(tokens_per_s=100_000, from_ssd=100 * MB).blocks_to_load(prompt(0, 500)) < 50
    # What is in memory is still loaded.
    loaded = decision(tokens_per_s=100_000, from_ssd=100 * MB).blocks_to_load(prompt(250, 250))
    assert 250 <= loaded < 300


def test_about_as_much_is_loaded_as_is_read_while_the_rest_is_computed() -> None:
    # Reading a block takes as long as computing it: half of each.
    even = decision(tokens_per_s=10_000, from_ssd=BLOCK_BYTES / (BLOCK_TOKENS / 10_000))
    assert even.blocks_to_load(prompt(0, 500, more_tokens=1)) == pytest.approx(250, abs=40)


def test_a_little_faster_is_not_worth_the_devices_time() -> None:
    slow = decision(tokens_per_s=10_000, from_ssd=BLOCK_BYTES / (BLOCK_TOKENS / 10_000) * 6)
    assert slow.blocks_to_load(prompt(0, 500, more_tokens=1)) == 500


def test_reads_that_are_queued_before_it_count() -> None:
    machine = decision()
    assert machine.blocks_to_load(prompt(0, 100)) == 100
    assert machine.blocks_to_load(prompt(0, 100, queued=10**11)) == 0
    assert machine.blocks_to_load(prompt(100, queued=10**11)) == 100  # not for what is in memory


def test_what_the_device_holds_makes_the_rest_dearer() -> None:
    """With attention that grows: a block late in a prompt is worth more than an early one."""
    cost = PrefillCost()
    for _ in range(50):
        for start, end in ((0, 2000), (8000, 10_000), (30_000, 32_000)):
            pairs = (end - start) * (start + end + 1) / 2
            cost.observe([(start, end)], (end - start) * 1e-5 + pairs * 1e-9)
    assert cost.known
    assert cost.seconds(30_000, 31_000) == pytest.approx(1000 * 1e-5 + 1000 * 30_500 * 1e-9, rel=0.05)
    assert cost.seconds(0, 1000) == pytest.approx(1000 * 1e-5 + 1000 * 500 * 1e-9, rel=0.05)


@pytest.mark.parametrize("policy", [LoadPolicy.LOAD, LoadPolicy.RECOMPUTE])
def test_the_decision_can_be_forced(policy: LoadPolicy) -> None:
    for machine in (decision(policy=policy), decision(policy=policy, tokens_per_s=1e9, from_ssd=1)):
        expected = 500 if policy is LoadPolicy.LOAD else 0
        assert machine.blocks_to_load(prompt(200, 300)) == expected


def test_waiting_for_a_read_must_not_take_longer_than_computing() -> None:
    machine = decision(tokens_per_s=10_000, from_ssd=1_000 * MB)
    # 8,000 tokens take 0.8 s to compute, whatever follows them.
    for total in (8_100, 50_000):
        assert machine.is_worth_waiting({SSD: int(700 * MB)}, 0, 8_000, total)
        assert not machine.is_worth_waiting({SSD: int(900 * MB)}, 0, 8_000, total)
        assert not machine.is_worth_waiting({SSD: int(700 * MB)}, 4_000, 8_000, total)
    # Of a long read it needs one block.
    assert not machine.is_worth_waiting({SSD: int(300 * MB)}, 0, 16, 10_000)
    forced = {policy: decision(policy=policy) for policy in LoadPolicy}
    assert forced[LoadPolicy.LOAD].is_worth_waiting({SSD: int(1e12)}, 0, 16, 10_000)
    assert not forced[LoadPolicy.RECOMPUTE].is_worth_waiting({SSD: 1}, 0, 10_000, 10_000)
    new = LoadOrRecompute(LoadPolicy.AUTO, block_bytes=BLOCK_BYTES, tokens_per_block=BLOCK_TOKENS)
    assert new.is_worth_waiting({SSD: int(1e12)}, 0, 16, 10_000)  # nothing is known yet


def test_what_is_not_known_yet_is_learned_by_loading() -> None:
    new = LoadOrRecompute(LoadPolicy.AUTO, block_bytes=BLOCK_BYTES, tokens_per_block=BLOCK_TOKENS)
    assert new.blocks_to_load(prompt(0, 500)) == 500
    # Memory and model are known, and the disk is not.
    for i in range(1, 10):
        new.prefill.observe([(0, 1000)], 1e-6)
        new.to_device.observe(i * 1e9, float(i))
    assert new.blocks_to_load(prompt(0, 500)) == 500
    assert new.blocks_to_load(prompt(500)) == 0


def test_the_speed_of_a_link_follows_what_is_measured() -> None:
    link = LinkSpeed()
    total_bytes = total_s = 0.0
    for speed in [1e9] * 10 + [2e9] * 30:
        total_bytes, total_s = total_bytes + speed * 0.01, total_s + 0.01
        link.observe(total_bytes, total_s)
        link.observe(total_bytes, total_s)  # nothing new
    assert link.known
    assert link.bytes_per_s == pytest.approx(2e9, rel=0.01)
    link.observe(total_bytes + 1, total_s + 1e-6)  # too short to tell
    assert link.bytes_per_s == pytest.approx(2e9, rel=0.01)


def test_a_link_that_was_slow_is_tried_again() -> None:
    now_s = 0.0
    link = LinkSpeed(lambda: now_s)
    for i in range(1, 6):
        link.observe(i * 1e3, i * 1.0)
    assert link.known
    assert link.bytes_per_s == pytest.approx(1e3)
    now_s = 61.0  # nobody has loaded since, for it was not worth it
    assert not link.known
    link.observe(5e3 + 1e9, 6.0)
    assert link.known
    assert link.bytes_per_s == pytest.approx(1e9)


def test_of_what_ends_at_boundaries_as_much_is_loaded_as_ends_at_one() -> None:
    """With windows a hit cannot be cut anywhere."""
    slow = decision(tokens_per_s=100_000, from_ssd=100 * MB)
    whole = prompt(250, 250)
    assert 250 <= slow.blocks_to_load(whole) < 300
    ends = np.array([100, 240, 400, 500])
    assert slow.blocks_to_load(dataclasses.replace(whole, ends=ends)) == 240
    assert slow.blocks_to_load(dataclasses.replace(whole, ends=np.array([500]))) in (0, 500)
    assert decision().blocks_to_load(dataclasses.replace(whole, ends=ends)) == 500


def test_windows_count_where_they_come_from_and_no_more_than_they_weigh() -> None:
    of_window = BLOCK_BYTES // 4
    costs = LoadOrRecompute(
        LoadPolicy.AUTO, block_bytes=BLOCK_BYTES, tokens_per_block=BLOCK_TOKENS, windows=[(3, of_window)]
    )
    tiers = np.array([SSD, SSD, CPU, CPU, SSD], np.uint8)
    assert costs.bytes_by_tier(tiers) == {SSD: 3 * BLOCK_BYTES + of_window}
    assert costs.bytes_by_tier(tiers[:2]) == {SSD: 2 * (BLOCK_BYTES + of_window)}
    assert costs.bytes_by_tier(tiers[2:4]) == {}


def test_a_window_that_is_read_takes_time_as_well() -> None:
    """One that is as large as the prefix takes as long to read as the prefix: half as much is worth it."""
    even = decision(tokens_per_s=10_000, from_ssd=BLOCK_BYTES / (BLOCK_TOKENS / 10_000))
    alone = even.blocks_to_load(prompt(0, 500, more_tokens=1))
    even._windows = [(500, BLOCK_BYTES)]
    assert even.blocks_to_load(prompt(0, 500, more_tokens=1)) == pytest.approx(alone * 2 / 3, abs=40)
