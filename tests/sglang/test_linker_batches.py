"""Several loads in one batch, layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from kit import TIMEOUT_S, assert_same
from linker_steps import MakeRig, sequence

from sglang_flexkv import _core
from sglang_flexkv.integration.compat.requests import name_of


def test_every_load_of_a_batch_is_waited_for(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=64)
    prompts = [sequence(10000 * n, n) for n in (1, 3, 6, 2)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = rig.restore(*reqs)
    for req, slots, bytes_ in zip(reqs, all_slots, expected, strict=True):
        assert_same(rig.read(slots), bytes_)
        rig.finish(req, slots)


def test_a_forward_waits_for_a_load_that_has_not_begun(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    slots = rig.admit(req)
    held_back: list[Callable[[], None]] = []
    launch = rig.engine.launch

    def hold_back(*args: Any, **kwargs: Any) -> None:
        held_back.append(lambda: launch(*args, **kwargs))

    with mock.patch.object(rig.engine, "launch", hold_back):
        rig.start_batch()
    seen: list[list[torch.Tensor]] = []
    forward = threading.Thread(target=lambda: seen.append(rig.read_layer(0, slots)), daemon=True)
    forward.start()
    forward.join(0.3)
    assert forward.is_alive()
    for start in held_back:
        start()
    forward.join(TIMEOUT_S)
    assert_same(seen[0], expected[: rig.buffers_per_layer])
    assert not rig.cache.finish_external_linker_loads([req])
    rig.finish(req, slots)


def test_a_gate_waits_for_the_second_load_even_if_the_first_has_landed_before_it(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second = sequence(1), sequence(5000)
    for seed, tokens in enumerate((first, second)):
        rig.insert(tokens, seed)
    rig.evict_all()
    reqs = [rig.request(first), rig.request(second)]
    slots = [rig.admit(req) for req in reqs]
    open_before_launch = []
    launch = rig.engine.launch

    def launch_when_the_last_one_has_landed(*args: Any, gate: _core.LayerGate, **kwargs: Any) -> None:
        assert rig.engine.drain(TIMEOUT_S)
        open_before_launch.append(gate.open_layers)
        launch(*args, gate=gate, **kwargs)

    with mock.patch.object(rig.engine, "launch", launch_when_the_last_one_has_landed):
        rig.start_batch()
    assert open_before_launch == [0, 0]
    rig.forward()
    assert not rig.cache.finish_external_linker_loads(reqs)
    for req, own in zip(reqs, slots, strict=True):
        rig.finish(req, own)


def test_batches_that_overlap_have_gates_of_their_own(make_rig: MakeRig) -> None:
    # SGLang finishes one batch's loads before it starts the next one's; pipelines of batches would not.
    rig = make_rig()
    prompts = [sequence(1), sequence(5000)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    loads = []
    for tokens in prompts:
        req = rig.request(tokens)
        loads.append((req, rig.admit(req), rig.linker.start_layer_wise_loading()))
    assert loads[0][2] != loads[1][2]
    for (req, slots, index), bytes_ in zip(loads, expected, strict=True):
        rig.linker.layer_done_counter.set_consumer(index)
        rig.forward()
        assert_same(rig.read(slots), bytes_)
        assert rig.linker.finish_layer_wise_loading(index) == {name_of(req)}
        rig.cache.linker.private_load_indices.pop(name_of(req))
        rig.cache.linker.inflight_load_rids.remove(name_of(req))
        rig.finish(req, slots)


def test_the_first_layer_is_usable_while_later_ones_are_still_copied(make_rig: MakeRig) -> None:
    num_layers = 32
    rig = make_rig(
        dtype=torch.float32, num_pages=1600, num_layers=num_layers, num_cpu_blocks=800, copy_threads=1
    )
    tokens = sequence(1, 700)
    expected = rig.insert(tokens, seed=1)
    overlapped = False
    # One look is enough; a machine that is busy with other things may make us look too late.
    for _ in range(20):
        rig.evict_all()
        req = rig.request(tokens)
        slots = rig.admit(req)
        index = rig.start_batch()
        gate = rig.linker.layer_done_counter._gates[index]
        first_layer = rig.read_layer(0, slots)
        open_layers = gate.open_layers
        assert open_layers >= 1
        assert_same(first_layer, expected[: rig.buffers_per_layer])
        rig.forward()
        assert gate.open_layers == num_layers
        assert_same(rig.read(slots), expected)
        assert not rig.cache.finish_external_linker_loads([req])
        rig.finish(req, slots)
        if open_layers < num_layers:
            overlapped = True
            break
    assert overlapped
