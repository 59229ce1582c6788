"""Two engines in one process, one after the other, and no end of requests for the second.

    python engines.py < job.json

The job has the ``arguments`` of ``sglang.Engine``, ``prompts`` (token ids), ``sampling_params``, and what to
``ask`` beside that of answers that are compared. The first engine, which SGLang kills at its end, goes when
the SSD tier in ``directory`` holds so many ``blocks``.
Prints lines of ``answers``, a space, and SGLang's answers as JSON: one for each engine, then more for the
second one, which goes on until somebody ends it.
"""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

from slot_files import wait_for_blocks


def tell(answers: Any) -> None:
    print("answers", json.dumps(answers), flush=True)


def main() -> None:
    import sglang

    # It is ignored in what a shell runs in its background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job = json.load(sys.stdin)
    prompts, params = job["prompts"], job["sampling_params"]

    def start() -> Any:
        engine = sglang.Engine(**job["arguments"])
        tell([engine.generate(input_ids=prompt, sampling_params=params, **job["ask"]) for prompt in prompts])
        return engine

    first = start()
    wait_for_blocks(job["blocks"], Path(job["directory"]))
    first.shutdown()
    second = start()
    while True:
        # Those that come back, and new ones that push them off the device.
        new = [random.sample(prompt, len(prompt)) for prompt in prompts]
        tell(second.generate(input_ids=prompts + new, sampling_params=params))


if __name__ == "__main__":  # SGLang's processes import this file, too
    main()
