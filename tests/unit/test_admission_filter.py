"""The memory of what was seen once: what it keeps, what it forgets, and how rarely it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_flexkv import _core

CAPACITY = 4096


def random_keys(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, size=(count, 2), dtype=np.uint64)


def test_a_key_is_seen_the_second_time() -> None:
    seen = _core.AdmissionFilter(CAPACITY)
    keys = random_keys(3, seed=1)
    assert seen.seen(keys[:2]).tolist() == [0, 0]
    assert seen.seen(keys).tolist() == [1, 1, 0]
    assert seen.seen(keys[[2, 2]]).tolist() == [1, 1]
    assert seen.seen(keys[:0]).tolist() == []


def test_a_key_twice_in_one_call_is_seen_the_second_time() -> None:
    keys = random_keys(1, seed=2)
    assert _core.AdmissionFilter(CAPACITY).seen(keys[[0, 0]]).tolist() == [0, 1]


@pytest.mark.parametrize("capacity", [1, 3, 100, CAPACITY, 100_003])
def test_as_many_keys_as_it_was_made_for_are_remembered(capacity: int) -> None:
    seen = _core.AdmissionFilter(capacity)
    seen.seen(random_keys(4 * capacity, seed=3))  # a full table must make room for them first
    keys = random_keys(capacity, seed=4)
    seen.seen(keys)
    # The newest first: a key that is not remembered pushes out an older one when it is asked for.
    assert seen.seen(keys[::-1]).mean() >= 0.9


def test_old_keys_are_forgotten() -> None:
    seen = _core.AdmissionFilter(CAPACITY)
    keys = random_keys(CAPACITY, seed=5)
    seen.seen(keys)
    seen.seen(random_keys(16 * CAPACITY, seed=6))
    assert seen.seen(keys).sum() == 0


def test_a_key_that_comes_back_is_kept() -> None:
    seen = _core.AdmissionFilter(CAPACITY)
    key = random_keys(1, seed=7)
    seen.seen(key)
    for round_ in range(64):
        seen.seen(random_keys(CAPACITY // 4, seed=100 + round_))
        assert seen.seen(key).tolist() == [1]


def test_new_keys_are_hardly_ever_taken_for_known_ones() -> None:
    seen = _core.AdmissionFilter(CAPACITY)
    assert seen.seen(random_keys(1_000_000, seed=8)).sum() <= 2


def test_a_key_whose_fingerprint_is_zero_is_not_an_empty_way() -> None:
    seen = _core.AdmissionFilter(CAPACITY)
    key = np.zeros((1, 2), dtype=np.uint64)
    assert seen.seen(key).tolist() == [0]
    assert seen.seen(key).tolist() == [1]


def test_clear_forgets_everything() -> None:
    seen = _core.AdmissionFilter(CAPACITY)
    keys = random_keys(100, seed=9)
    seen.seen(keys)
    seen.clear()
    assert seen.seen(keys).sum() == 0


def test_a_filter_for_no_key_and_keys_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="holds 1 to"):
        _core.AdmissionFilter(0)
    with pytest.raises(ValueError, match="shape"):
        _core.AdmissionFilter(1).seen(np.zeros(4, dtype=np.uint64))
