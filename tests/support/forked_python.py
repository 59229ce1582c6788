"""Python that has imported SGLang already: a fork of the zygote (forked_server.py).

    python forked_python.py -u -c TEXT

is ``python -u -c TEXT``, which is how xdist starts its processes.
"""

from __future__ import annotations

import sys

from forked_server import start_python


def main() -> None:
    unbuffered, text, program = sys.argv[1:]
    assert (unbuffered, text) == ("-u", "-c")
    sys.exit(start_python(program, [], (0, 1, 2)).wait())


if __name__ == "__main__":
    main()
