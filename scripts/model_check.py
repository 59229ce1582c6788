#!/usr/bin/env python3
"""Runs the index side by side with a naive model (tests/support/index_model.py), for as long as one likes.

    scripts/model_check.py --operations 1000000 --seed 0

Integrity is checked after every operation. Exit status 1: index and model do not agree on something, and the
line says how to bring it back.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from index_model import Divergence, Policy, run_episodes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000, help="over all policies")
    parser.add_argument("--seed", type=int, default=0, help="of the first small index; then it counts up")
    parser.add_argument("--policy", choices=list(Policy.__members__), help="only this one")
    arguments = parser.parse_args()
    names = [arguments.policy] if arguments.policy else list(Policy.__members__)
    each = -(-arguments.operations // len(names))
    diverged = False
    for name in names:
        start = time.monotonic()
        try:
            run_episodes(Policy.__members__[name], arguments.seed, each)
        except Divergence as divergence:
            diverged = True
            print(f"{name:9} DIVERGENCE; --policy {name} --seed with that seed repeats it: {divergence}")
        else:
            rate = each / (time.monotonic() - start)
            print(f"{name:9} {each:9,} operations agree, {rate:,.0f} a second", flush=True)
    return diverged


if __name__ == "__main__":
    sys.exit(main())
