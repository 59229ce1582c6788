"""How much of a hit is loaded, decided by measured speeds or forced."""

from __future__ import annotations

import pytest
from linker_steps import PAGE, PAGES, MakeRig, nobody_else, sequence

from sglang_flexkv.common.config import LoadPolicy, WritePolicy


@pytest.mark.parametrize("policy", LoadPolicy, ids=lambda policy: policy.value)
def test_how_much_is_loaded_can_be_forced(make_rig: MakeRig, policy: LoadPolicy) -> None:
    rig = make_rig(load_policy=policy)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    decision = rig.linker.load_or_recompute
    for _ in range(10):  # computing takes nothing, copying takes for ever
        decision.prefill.observe([(0, 1000)], 1e-6)
        decision.to_device.observe(decision.to_device._bytes + 1, decision.to_device._busy_s + 1.0)
    req = rig.request(sequence(1))
    match = rig.match(req)
    assert match.host_hit_length == (PAGES * PAGE if policy is LoadPolicy.LOAD else 0)
    rig.abort(req)
    held = 0 if policy is LoadPolicy.LOAD else PAGES * PAGE
    assert rig.linker.metrics.total["recomputed"] == held


def test_speeds_are_measured_as_the_server_runs(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=600, num_layers=8, num_cpu_blocks=600)
    rig.cache.attach_scheduler(nobody_else())
    tokens = sequence(1, 500)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    decision = rig.linker.load_or_recompute
    assert not decision.prefill.known
    for _ in range(5):
        # A batch that loads nothing, of a request that computes everything.
        req = rig.request(sequence(50_000))
        req.prefix_len, req.extend_end = 0, len(req.origin_input_ids)
        rig.start_batch()
        assert rig.cache.finish_external_linker_loads([req]) == []
        # And one that loads: it says nothing about the model.
        req = rig.request(tokens)
        (slots,) = rig.restore(req)
        rig.abort(req, slots)
    assert decision.prefill.known
    assert decision.prefill._fit.num_observed == 5
    assert decision.to_device.bytes_per_s > 0


@pytest.mark.parametrize("shares_forwards", [False, True])
def test_a_forward_that_others_share_says_nothing_about_a_prefill(
    make_rig: MakeRig, shares_forwards: bool
) -> None:
    """It takes as long as the rank needs that has most to compute, or to read."""
    rig = make_rig()
    rig.cache.attach(rig.linker, WritePolicy.WRITE_THROUGH, shares_forwards=shares_forwards)
    rig.cache.attach_scheduler(nobody_else())
    req = rig.request(sequence(1))
    req.prefix_len, req.extend_end = 0, len(req.origin_input_ids)
    rig.start_batch()
    assert rig.cache.finish_external_linker_loads([req]) == []
    observed = rig.linker.load_or_recompute.prefill._fit.num_observed
    assert observed == (0 if shares_forwards else 1)
    rig.abort(req)
