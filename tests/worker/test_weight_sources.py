"""Weights by copy: the best source that fits, in order, checked; or a typed error (R6, R20)."""

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from appliance.core.model_shape import SUM_CHUNK_BYTES, ModelShape, SlabLayout, slab_bytes
from appliance.core.start import WeightPlan
from appliance.modeling import parallel
from appliance.modeling.errors import WeightError
from appliance.modeling.parallel import run_pieces
from appliance.modeling.safetensors_file import open_checkpoint
from appliance.modeling.slab import STATE_FILLING, attach, fingerprint_of, is_complete
from appliance.modeling.slab_reading import locate, read_parts
from appliance.modeling.slab_sums import SAMPLE_CHUNKS, bad_chunk, sample_of, store_sums
from appliance.modeling.slab_target import SlabTarget
from appliance.worker.torch_engine import read_shape
from appliance.worker.weight_slab import MappedWeights, WeightRequest, open_weights
from appliance.worker.weight_sources import DiskSource, Receiver, SlabSource, receive
from tests.modeling.checkpoints import CheckpointStore


class Shelf:
    """The node's part: memory files for slabs of one checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shape: ModelShape = read_shape(directory)
        self.fds: list[int] = []

    def slab(self, num_bytes: int | None = None) -> int:
        """An empty slab."""
        self.fds.append(os.memfd_create("weights"))
        os.ftruncate(self.fds[-1], num_bytes or slab_bytes(self.shape, "float32"))
        return self.fds[-1]

    def view(self, fd: int) -> memoryview:
        """What is in a slab, writable."""
        return memoryview(mmap.mmap(fd, 0))

    def receiver(self, fd: int, *, through_fd: bool = True, **more: object) -> Receiver:
        """Somebody who wants the weights in that slab."""
        settings = {"fingerprint": fingerprint_of(self.directory), "threads": 2, **more}
        target = SlabTarget(view=self.view(fd), fd=fd if through_fd else None)
        return Receiver(target=target, shape=self.shape, dtype="float32", **settings)

    def filled(self) -> int:
        """A slab filled from disk."""
        fd = self.slab()
        assert receive(self.receiver(fd), [self.disk]).source == "disk"
        return fd

    @property
    def disk(self) -> DiskSource:
        return DiskSource(self.directory)

    def same(self, *fds: int) -> bool:
        """Whether these slabs are complete and equal bit for bit, and hold the checkpoint."""
        views = [self.view(fd) for fd in fds]
        fingerprint = fingerprint_of(self.directory)
        for view in views:
            attach(view, shape=self.shape, dtype="float32", fingerprint=fingerprint)
        return all(view == views[0] for view in views)

    def open(self, fds: list[int], *, load: bool = False, **plan: object) -> MappedWeights:
        """What a worker does at its start."""
        return open_weights(
            fds,
            WeightRequest(
                model_dir=self.directory,
                shape=self.shape,
                dtype="float32",
                plan=WeightPlan(**plan),
                load=load,
            ),
        )


@pytest.fixture
def shelf(checkpoint: CheckpointStore, tmp_path: Path) -> Iterator[Shelf]:
    """Slabs of a checkpoint that a test may damage."""
    shelf = Shelf(Path(shutil.copytree(checkpoint("llama"), tmp_path / "model")))
    yield shelf
    for fd in shelf.fds:
        os.close(fd)


def test_r6_who_has_received_is_a_source(shelf: Shelf) -> None:
    first, second, third = shelf.filled(), shelf.slab(), shelf.slab()
    got = receive(shelf.receiver(second), [SlabSource("peer:0", first), shelf.disk])
    assert (got.source, got.refused) == ("peer:0", ())
    assert "1 of 1 chunks" in got.checked
    assert receive(shelf.receiver(third), [SlabSource("peer:1", second)]).source == "peer:1"
    assert shelf.same(first, second, third)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("through_fd", [False, True])
def test_neither_threads_nor_ways_of_writing_change_what_is_read_or_copied(
    shelf: Shelf, threads: int, through_fd: bool
) -> None:
    read, copied = shelf.slab(), shelf.slab()
    how = {"threads": threads, "through_fd": through_fd, "full_check": True}
    receive(shelf.receiver(read, **how), [shelf.disk])
    receive(shelf.receiver(copied, **how), [SlabSource("host", read)])
    assert shelf.same(read, copied, shelf.filled())


def test_what_is_only_to_be_mapped_has_no_checksums_and_is_no_source(shelf: Shelf) -> None:
    shared, own = shelf.slab(), shelf.slab()
    shelf.open([shared], load=True)
    got = receive(shelf.receiver(own), [SlabSource("host", shared), shelf.disk])
    assert got.source == "disk"
    assert "without checksums" in got.refused[0]


def damage_json(view: memoryview) -> None:
    view[24:26] = b"}{"


def move_a_tensor(view: memoryview) -> None:
    head = bytes(view[:4096])
    at = head.index(b'"offset": ') + len(b'"offset": ')
    view[at : at + 1] = b"9"


def give_up(view: memoryview) -> None:
    view[12:16] = STATE_FILLING.to_bytes(4, "little")


def other_files(view: memoryview) -> None:
    head = bytes(view[:16384])
    at = head.index(b'"fingerprint": "') + len(b'"fingerprint": "')
    view[at : at + 4] = b"0000" if head[at : at + 4] != b"0000" else b"1111"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damage_json, "manifest of the weight slab is damaged"),
        (move_a_tensor, "holds another model or dtype"),
        (give_up, "not complete"),
        (other_files, "files changed since the weight slab was filled"),
    ],
)
def test_a_wrong_manifest_is_found_before_a_byte_is_copied(
    shelf: Shelf, harm: Callable[[memoryview], None], words: str
) -> None:
    wrong, right, own = shelf.filled(), shelf.filled(), shelf.slab()
    harm(shelf.view(wrong))
    with pytest.raises(WeightError, match=words):
        SlabSource("peer:0", wrong).check(shelf.receiver(own))
    assert not any(shelf.view(own)[: 1 << 12])
    sources = [SlabSource("peer:0", wrong), SlabSource("host", right), shelf.disk]
    got = receive(shelf.receiver(own), sources)
    assert got.source == "host"
    (reason,) = got.refused
    assert "peer:0" in reason
    assert words in reason
    assert shelf.same(own, right)


def test_a_slab_that_is_too_small_is_not_a_source(shelf: Shelf) -> None:
    got = receive(
        shelf.receiver(shelf.slab()), [SlabSource("peer:0", shelf.slab(4096)), shelf.disk]
    )
    assert got.source == "disk"
    assert "4096 bytes" in got.refused[0]


def flip(view: memoryview, offset: int) -> None:
    view[offset] ^= 1


@pytest.mark.parametrize("place", ["tensor", "checksum"])
def test_a_flipped_byte_of_the_source_ends_in_the_next_source(shelf: Shelf, place: str) -> None:
    wrong, own = shelf.filled(), shelf.slab()
    receiver = shelf.receiver(own, full_check=True)
    offset = receiver.layout.header + 77 if place == "tensor" else receiver.layout.sums
    flip(shelf.view(wrong), offset)
    with pytest.raises(WeightError, match=r"wrong bytes|checksums are damaged"):
        SlabSource("peer:0", wrong).fill(receiver)
    assert not is_complete(shelf.view(own))
    got = receive(receiver, [SlabSource("peer:0", wrong), shelf.disk])
    assert got.source == "disk"
    assert shelf.same(own, shelf.filled())


def test_a_sample_finds_one_bad_chunk_with_the_stated_probability() -> None:
    layout = SlabLayout(header=4096, sums=4096 + 256 * SUM_CHUNK_BYTES)
    view = memoryview(mmap.mmap(-1, layout.total))
    store_sums(view, layout, range(layout.num_chunks))
    flip(view, layout.chunk(100).stop - 1)
    assert [chunk for chunk in (99, 100, 101) if bad_chunk(view, layout, chunk)] == [100]
    samples = [sample_of(layout, seed=worker << 32 | 1) for worker in range(400)]
    assert all(len(set(sample)) == SAMPLE_CHUNKS for sample in samples)
    share = sum(100 in sample for sample in samples) / len(samples)
    assert abs(share - SAMPLE_CHUNKS / 256) < 0.06


def test_a_source_that_is_filled_anew_during_the_copy_ends_in_the_next_one(shelf: Shelf) -> None:
    lost, right, own = shelf.filled(), shelf.filled(), shelf.slab()
    receiver = shelf.receiver(own, reach=lambda _: give_up(shelf.view(lost)))
    got = receive(receiver, [SlabSource("peer:0", lost), SlabSource("peer:1", right)])
    assert got.source == "peer:1"
    assert "not complete" in got.refused[0]
    assert shelf.same(own, right)


class DyingSource:
    """A source that goes away in the middle, as a device of a dead process does."""

    name = "peer:0"

    def check(self, receiver: Receiver) -> None:
        pass

    def fill(self, receiver: Receiver) -> str:
        receiver.view[100:200] = bytes(range(100))
        raise OSError("the peer's memory has gone")


def test_a_source_that_dies_during_the_copy_ends_in_the_next_one(shelf: Shelf) -> None:
    own = shelf.slab()
    got = receive(shelf.receiver(own), [DyingSource(), shelf.disk])
    assert got.source == "disk"
    assert "memory has gone" in got.refused[0]
    assert shelf.same(own, shelf.filled())


def test_r20_without_any_source_the_error_names_all_of_them(shelf: Shelf) -> None:
    (shelf.directory / "model.safetensors").write_bytes(b"short")
    own, empty = shelf.slab(), shelf.slab()
    with pytest.raises(WeightError) as caught:
        receive(shelf.receiver(own), [DyingSource(), SlabSource("host", empty), shelf.disk])
    text = str(caught.value)
    assert "\n" not in text
    for words in ("peer:0: the peer's memory", "host: the weight slab is not", "fetch it again"):
        assert words in text
    assert not is_complete(shelf.view(own))


def test_r20_a_file_that_is_cut_short_while_it_is_read_is_named(shelf: Shelf) -> None:
    files = open_checkpoint(shelf.directory)
    parts = locate(files, shelf.shape, "float32")
    file = shelf.directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(WeightError, match=r"model\.safetensors: ends at byte \d+ .*fetch it again"):
        read_parts(
            SlabTarget(view=shelf.view(shelf.slab())),
            parts,
            shape=shelf.shape,
            dtype="float32",
            threads=2,
            progress=parallel.nothing,
            with_sums=False,
        )


def test_files_that_are_not_those_the_node_serves_are_refused(shelf: Shelf) -> None:
    served = fingerprint_of(shelf.directory)
    os.utime(shelf.directory / "model.safetensors")
    with pytest.raises(WeightError, match=r"changed since the node read them; start the node anew"):
        receive(shelf.receiver(shelf.slab(), fingerprint=served), [shelf.disk])


def test_r6_a_worker_with_weights_of_its_own(shelf: Shelf) -> None:
    host, one, two = shelf.slab(), shelf.slab(), shelf.slab()
    first = shelf.open([one, host], load=True, own=True, sources=("host",))
    assert first.source == "disk through host"
    assert first.num_bytes == slab_bytes(shelf.shape, "float32")
    assert shelf.same(host, one)
    plan = {"own": True, "sources": ("peer:0", "host"), "fingerprint": first.fingerprint}
    second = shelf.open([two, one, host], **plan)
    assert second.source == "peer:0"
    os.utime(shelf.directory / "model.safetensors")  # new files: what the node serves counts
    again = shelf.open([two, one, host], **plan)
    assert (again.source, again.num_bytes) == ("slab", 0)
    assert all(torch.equal(second.tensors[name], each) for name, each in again.tensors.items())


def test_r6_a_half_filled_slab_of_its_own_is_filled_again(shelf: Shelf) -> None:
    own = shelf.filled()
    give_up(shelf.view(own))
    got = shelf.open([own, shelf.filled()], own=True, sources=("peer:0",), full_check=True)
    assert got.source == "peer:0"
    assert "checksums of 1 of 1 chunks" in got.notes[0]


def test_mapping_touches_no_page_but_the_head(shelf: Shelf) -> None:
    fd = shelf.filled()
    fresh = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    resident = resident_bytes(fresh)
    tensors = attach(memoryview(fresh), shape=shelf.shape, dtype="float32")
    assert resident == 0
    assert resident_bytes(fresh) <= 16 * 4096  # the kernel maps what stands around a page too
    assert tensors["embed"].abs().sum() > 0


def resident_bytes(mapped: mmap.mmap) -> int:
    """Bytes of this mapping that this process has mapped in."""
    address = torch.frombuffer(memoryview(mapped), dtype=torch.uint8).data_ptr()
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{address:08x}-"))
    rss = next(line for line in lines[start:] if line.startswith("Rss:"))
    return int(rss.split()[1]) * 1024


def test_the_first_error_is_raised_and_ends_the_work() -> None:
    done: list[int] = []

    def work(piece: int) -> int:
        if piece == 3:
            raise WeightError("piece 3")
        done.append(piece)
        return 1

    with pytest.raises(WeightError, match="piece 3"):
        run_pieces(range(10_000), work, num_bytes=10_000, threads=1)
    assert done[:3] == [0, 1, 2]
    assert len(done) < 10_000


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PROGRESS_SECONDS", 0.01)
    heard: list[tuple[int, int]] = []
    gate = iter([0.05] * 4)
    run_pieces(
        range(4),
        lambda _: parallel.time.sleep(next(gate)) or 25,
        num_bytes=100,
        threads=1,
        progress=lambda done, total, _: heard.append((done, total)),
    )
    assert heard
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert {total for _, total in heard} == {100}
