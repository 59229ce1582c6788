"""SSD files that were damaged, cut, mixed up and put back from an earlier day: nothing that is served may
differ from what was stored under its key, and damage is found out where it must be."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ssd_rig import NAMESPACE, Memory, Rig, memory_directory

from sglang_flexkv import _core

CASES = 1000
SLOTS, SLICES, SLICE = 16, 2, 4096
SLOT = SLICES * SLICE
OFFSET = _core.SSD_SLOTS_OFFSET
PAGE = 4096
LIVE = {slot: slot + (100 if slot < 8 else 0) for slot in range(SLOTS)}
OTHER_NAMESPACE = b"another one, yes"
EVERY = set(range(SLOTS))


class Template:
    """Directories with files of known content, to be copied and damaged."""

    def __init__(self, directory: Path) -> None:
        self.memory = Memory(SLOTS, SLICES, SLICE)
        self.live, self.twin, self.foreign = (directory / name for name in ("live", "twin", "foreign"))
        self.stale_journal = directory / "stale"
        for each, namespace in (
            (self.live, NAMESPACE),
            (self.twin, NAMESPACE),
            (self.foreign, OTHER_NAMESPACE),
        ):
            each.mkdir()
            rig = Rig(each, self.memory, namespace=namespace)
            for slot in range(SLOTS):  # a frame for each
                self._store(rig, {slot: slot})
            if each is self.live:
                shutil.copy(each / "journal", self.stale_journal)
            for slot in range(8):
                self._store(rig, {slot: 100 + slot})
            rig.close()
        self.journal_bytes = (self.live / "journal").stat().st_size

    def _store(self, rig: Rig, blocks: dict[int, int]) -> None:
        assert rig.write(blocks)
        assert rig.store.sync(30.0)

    def open(self, directory: Path) -> Rig:
        return Rig(directory, self.memory)


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    for directory in memory_directory():
        yield Template(directory)


@pytest.fixture
def copies() -> Iterator[Path]:
    yield from memory_directory()


def flip(path: Path, begin: int, end: int, rng: random.Random) -> int:
    """Flips a bit somewhere in the range; returns where."""
    at = rng.randrange(begin, end)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return at


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def piece(path: Path, at: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(size)


# Each damages a copy and returns which slots must be served afterwards, no more and no fewer; None where that
# depends on what was hit.
Damage = Callable[[Template, Path, random.Random], "set[int] | None"]


def bit_in_slot(template: Template, directory: Path, rng: random.Random) -> set[int]:
    at = flip(directory / "slots", OFFSET, OFFSET + SLOTS * SLOT, rng)
    return EVERY - {(at - OFFSET) // SLOT}


def bits_in_slots(template: Template, directory: Path, rng: random.Random) -> None:
    for _ in range(rng.randint(2, 20)):
        flip(directory / "slots", OFFSET, OFFSET + SLOTS * SLOT, rng)


def bit_in_journal(template: Template, directory: Path, rng: random.Random) -> None:
    flip(directory / "journal", 0, template.journal_bytes, rng)


def bits_in_journal(template: Template, directory: Path, rng: random.Random) -> None:
    for _ in range(rng.randint(2, 20)):
        # Where frames begin, half of the time: their headers and records are short and seldom hit by chance.
        begin = rng.randrange(template.journal_bytes // PAGE) * PAGE
        flip(directory / "journal", begin, begin + rng.choice([144, PAGE]), rng)


def bit_in_superblock(template: Template, directory: Path, rng: random.Random) -> set[int] | None:
    at = flip(directory / "slots", 0, 2 * PAGE, rng)
    # Behind magic and version the other copy stands in; there, another program's file is what it looks like.
    return EVERY if at % PAGE >= 12 else None


def bits_in_superblocks(template: Template, directory: Path, rng: random.Random) -> set[int] | None:
    hit = [flip(directory / "slots", copy * PAGE, (copy + 1) * PAGE, rng) % PAGE for copy in (0, 1)]
    return set() if min(hit) >= 12 else None


def slots_cut(template: Template, directory: Path, rng: random.Random) -> set[int] | None:
    size = rng.choice([rng.randrange(OFFSET), rng.randrange(OFFSET, OFFSET + SLOTS * SLOT)])
    cut(directory / "slots", size)
    return None if size < 2 * PAGE else {slot for slot in EVERY if OFFSET + (slot + 1) * SLOT <= size}


def journal_cut(template: Template, directory: Path, rng: random.Random) -> None:
    cut(directory / "journal", rng.randrange(template.journal_bytes))


def journal_gone(template: Template, directory: Path, rng: random.Random) -> set[int]:
    (directory / "journal").unlink()
    return set()


def slots_gone(template: Template, directory: Path, rng: random.Random) -> set[int]:
    (directory / "slots").unlink()
    return set()


def slots_swapped(template: Template, directory: Path, rng: random.Random) -> set[int]:
    a, b = rng.sample(range(SLOTS), 2)
    of_a, of_b = (piece(directory / "slots", OFFSET + slot * SLOT, SLOT) for slot in (a, b))
    overwrite(directory / "slots", OFFSET + a * SLOT, of_b)
    overwrite(directory / "slots", OFFSET + b * SLOT, of_a)
    return EVERY - {a, b}


def slices_swapped(template: Template, directory: Path, rng: random.Random) -> set[int]:
    slot = rng.randrange(SLOTS)
    data = piece(directory / "slots", OFFSET + slot * SLOT, SLOT)
    overwrite(directory / "slots", OFFSET + slot * SLOT, data[SLICE:] + data[:SLICE])
    return EVERY - {slot}


def stale_journal(template: Template, directory: Path, rng: random.Random) -> set[int]:
    shutil.copy(template.stale_journal, directory / "journal")
    return set(range(8, SLOTS))  # the others were overwritten since


def stale_frames_behind(template: Template, directory: Path, rng: random.Random) -> set[int]:
    with (directory / "journal").open("ab") as file:
        file.write(template.stale_journal.read_bytes()[PAGE:])
    return EVERY


def frames_shuffled(template: Template, directory: Path, rng: random.Random) -> None:
    pages = [piece(directory / "journal", at, PAGE) for at in range(PAGE, template.journal_bytes, PAGE)]
    rng.shuffle(pages)
    overwrite(directory / "journal", PAGE, b"".join(pages))


def frames_missing(template: Template, directory: Path, rng: random.Random) -> None:
    pages = template.journal_bytes // PAGE
    for page in rng.sample(range(1, pages), rng.randint(1, pages // 2)):
        overwrite(directory / "journal", page * PAGE, bytes(PAGE))


def noise_in_journal(template: Template, directory: Path, rng: random.Random) -> None:
    at = rng.randrange(template.journal_bytes)
    overwrite(directory / "journal", at, rng.randbytes(rng.randint(1, 3 * PAGE)))


def noise_in_slots(template: Template, directory: Path, rng: random.Random) -> None:
    at = rng.randrange(OFFSET + SLOTS * SLOT - 3 * PAGE)
    overwrite(directory / "slots", at, rng.randbytes(rng.randint(1, 3 * PAGE)))


def journal_of_twin(template: Template, directory: Path, rng: random.Random) -> set[int]:
    shutil.copy(template.twin / "journal", directory / "journal")
    return set()


def journal_of_foreign(template: Template, directory: Path, rng: random.Random) -> set[int]:
    shutil.copy(template.foreign / "journal", directory / "journal")
    return set()


def frames_of_twin(template: Template, directory: Path, rng: random.Random) -> set[int]:
    twin = (template.twin / "journal").read_bytes()
    with (directory / "journal").open("ab") as file:
        file.write(twin[PAGE:])
    return EVERY


def slots_of_foreign(template: Template, directory: Path, rng: random.Random) -> None:
    shutil.copy(template.foreign / "slots", directory / "slots")


def several(template: Template, directory: Path, rng: random.Random) -> None:
    kinds: list[Damage] = [bit_in_slot, bit_in_journal, noise_in_journal, slots_swapped, frames_shuffled]
    for damage in rng.sample(kinds, 3):
        damage(template, directory, rng)


DAMAGES: list[Damage] = [
    bit_in_slot,
    bits_in_slots,
    bit_in_journal,
    bits_in_journal,
    bit_in_superblock,
    bits_in_superblocks,
    slots_cut,
    journal_cut,
    journal_gone,
    slots_gone,
    slots_swapped,
    slices_swapped,
    stale_journal,
    stale_frames_behind,
    frames_shuffled,
    frames_missing,
    noise_in_journal,
    noise_in_slots,
    journal_of_twin,
    journal_of_foreign,
    frames_of_twin,
    slots_of_foreign,
    several,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage(template: Template, copies: Path, damage: Damage) -> None:
    opened = 0
    count = -(-CASES // len(DAMAGES))
    for seed in range(count):
        rng = random.Random(f"{damage.__name__} {seed}")
        directory = copies / "case"
        shutil.copytree(template.live, directory)
        expected = damage(template, directory, rng)
        refusal = ""
        try:
            rig = template.open(directory)
        except _core.CoreSystemError as error:
            refusal = str(error)
        if refusal:
            assert expected is None, f"seed {seed}: not opened: {refusal}"
            assert str(directory) in refusal
        else:
            opened += 1
            served, _ = rig.read()  # which compares the bytes of what is served
            assert expected is None or served == expected, f"seed {seed}"
            # What came through is in order: it can be written, and is found with the rest the next time.
            slot = rng.randrange(SLOTS)
            assert rig.write({slot: 500})
            assert rig.store.sync(30.0)
            again = served | {slot}
            rig.close()
            rig = template.open(directory)
            assert rig.found[slot] == 500
            assert rig.read()[0] == again, f"seed {seed}: not the same after another start"
            rig.close()
        shutil.rmtree(directory)
    may_refuse = (bit_in_superblock, bits_in_superblocks, bit_in_journal, bits_in_journal, slots_cut)
    if damage is slots_of_foreign:
        assert opened == 0
    elif damage not in (*may_refuse, noise_in_journal, noise_in_slots, several):
        assert opened == count


def test_files_of_another_namespace_are_refused_and_kept(template: Template, copies: Path) -> None:
    directory = copies / "case"
    shutil.copytree(template.foreign, directory)
    before = (directory / "slots").read_bytes(), (directory / "journal").read_bytes()
    with pytest.raises(_core.CoreMismatchError, match="holds the cache of another model or setting"):
        template.open(directory)
    assert before == ((directory / "slots").read_bytes(), (directory / "journal").read_bytes())
    rig = Rig(directory, template.memory, fresh_on_mismatch=True)
    assert rig.found == {}
    rig.close()


def test_key_that_the_slot_does_not_hold(template: Template, copies: Path) -> None:
    directory = copies / "case"
    shutil.copytree(template.live, directory)
    rig = template.open(directory)
    assert rig.read({0: LIVE[1], 5: LIVE[5]}) == ({5}, {0})
    rig.close()
