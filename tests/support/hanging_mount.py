"""A file system of a test (bindfs, by FUSE) that can be made to hang: whoever asks it for anything waits
until it goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from service import Service, is_missing

_STARTS_WITHIN_S = 20.0


class HangingMount(Service):
    """Mounted when it is made, over ``held``, a directory beside it. ``send`` SIGSTOP and it hangs. Where
    there is no bindfs the test is skipped, but not on CI."""

    def __init__(self, directory: Path) -> None:
        self._binary = shutil.which("bindfs")
        if self._binary is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
            is_missing("bindfs")
        self.directory, self.held = directory / "mount", directory / "held"
        self.directory.mkdir()
        self.held.mkdir()
        self._log = directory / "bindfs.log"
        self.start()

    def start(self) -> None:
        log = self._log.open("ab")
        # Nothing that the kernel keeps of it answers in its place. What was written while it
        # was gone stays under it.
        options = "attr_timeout=0,entry_timeout=0,negative_timeout=0,nonempty"
        self._process = subprocess.Popen(
            [str(self._binary), "-f", "-o", options, str(self.held), str(self.directory)],
            stdout=log,
            stderr=log,
        )
        log.close()
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while not os.path.ismount(self.directory):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "bindfs does not start"
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"file://{self.directory}?mounted=yes"

    def stop(self) -> None:
        super().stop()
        # What it was serving fails now, and who looks at the directory must not.
        subprocess.run(["umount", "--lazy", str(self.directory)], check=False)
