"""Weights by copy: from the best source that has them, into memory of the receiver's own.

A receiver goes through its sources in order (peers, the node's slab in host memory, disk). Each is
asked first whether it fits: the manifest must name exactly the tensors, offsets, shapes and dtype
that are wanted, read from the files that the node serves. Then its bytes are copied, then the copy
is checked against the checksums that were made when the checkpoint was read. A source that does not
fit, goes away or gives wrong bytes is left with a reason, and the next one is tried; if none is
left, the error names them all. A slab that was received is complete: others may copy from it.

`WeightSource` is the seam: a device-to-device copy is one more implementation of it.
"""

import json
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from appliance.core.model_shape import (
    DType,
    ModelShape,
    SlabLayout,
    slab_layout,
)
from appliance.modeling.errors import WeightError
from appliance.modeling.parallel import Progress, nothing, run_pieces
from appliance.modeling.slab import (
    begin_filling,
    check_manifest,
    complete,
    load_into_slab,
)
from appliance.modeling.slab_sums import bad_chunk, digest_of_sums, sample_of
from appliance.modeling.slab_target import SlabTarget

COPY_BYTES = 8 << 20
CHECK_CHUNKS = 32
"""That a thread checks at a time."""


def no_fault(_: str) -> None:
    """A named place of the protocol at which nothing happens."""


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """Whose weights are missing: a writable slab and what belongs into it."""

    target: SlabTarget
    shape: ModelShape
    dtype: DType
    fingerprint: str = ""
    """Of the checkpoint's files; empty: anything fits."""
    threads: int = 1
    with_sums: bool = True
    """Whoever reads from disk also makes the checksums that others need to copy from it."""
    full_check: bool = False
    seed: int = 0
    """Draws the sample of checksums; another one for every receiver."""
    reach: Callable[[str], None] = no_fault
    """Told of the named places at which a fault may be injected."""
    progress: Callable[[str], Progress] = field(default=lambda _: nothing)
    """Given the name of a source: who is told how far it is."""

    @property
    def view(self) -> memoryview:
        """All of the slab."""
        return self.target.view

    @property
    def layout(self) -> SlabLayout:
        """Where things stand in the slab."""
        return slab_layout(self.shape, self.dtype)


class WeightSource(Protocol):
    """Somewhere that weights can come from."""

    @property
    def name(self) -> str:
        """ "peer:1", "host", "disk"."""

    def check(self, receiver: Receiver) -> None:
        """Whether it fits, before any byte is moved. Raises `WeightError` or `OSError` if not."""

    def fill(self, receiver: Receiver) -> str:
        """Move all bytes, check them, leave the receiver's slab complete; what was checked, in
        words. Raises `WeightError` or `OSError`; the slab is not complete then."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """How it went."""

    source: str
    refused: tuple[str, ...] = ()
    """Why each better source was not used, one line each."""
    checked: str = ""
    """What was compared after the copy."""
    seconds: float
    """Of the source that was used."""


class SlabSource:
    """A slab that this process can map: a peer's, or the node's in host memory.

    Nothing but the slab's own words counts: it belongs to the node and stays readable when its
    worker dies, but a successor may begin to fill it anew. So its head is read again after the
    copy: a slab that is not the same any more has not been copied."""

    def __init__(self, name: str, fd: int) -> None:
        """`fd` stays the caller's and must be open until it was filled from."""
        self._name = name
        self._fd = fd
        self._mapped: memoryview | None = None

    @property
    def name(self) -> str:
        """See `WeightSource`."""
        return self._name

    def check(self, receiver: Receiver) -> None:
        """See `WeightSource`."""
        if not json.loads(self._manifest(self._map(receiver), receiver)).get("sums"):
            raise WeightError("it was filled without checksums")

    def fill(self, receiver: Receiver) -> str:
        """See `WeightSource`."""
        source, layout = self._map(receiver), receiver.layout
        manifest = self._manifest(source, receiver)
        begin_filling(receiver.view)

        def copy(begin: int) -> int:
            end = min(begin + COPY_BYTES, layout.total)
            receiver.target.write(begin, source[begin:end])
            receiver.reach("worker.weights.copy")
            return end - begin

        run_pieces(
            range(layout.header, layout.total, COPY_BYTES),
            copy,
            num_bytes=layout.total - layout.header,
            threads=receiver.threads,
            progress=receiver.progress(self._name),
        )
        if self._manifest(source, receiver) != manifest:
            raise WeightError("it was filled anew while it was being copied")
        checked = check_copy(receiver, sums=json.loads(manifest).get("sums", ""))
        complete(receiver.view, manifest, shape=receiver.shape)
        return checked

    def _map(self, receiver: Receiver) -> memoryview:
        if self._mapped is None:
            size, needed = os.fstat(self._fd).st_size, receiver.layout.total
            if size < needed:
                raise WeightError(f"it has {size} bytes, the model needs {needed}")
            mapped = mmap.mmap(self._fd, needed, mmap.MAP_SHARED, mmap.PROT_READ)
            self._mapped = memoryview(mapped)
        return self._mapped

    def _manifest(self, view: memoryview, receiver: Receiver) -> bytes:
        return check_manifest(
            view,
            shape=receiver.shape,
            dtype=receiver.dtype,
            fingerprint=receiver.fingerprint or None,
        )


class DiskSource:
    """The checkpoint itself."""

    name = "disk"

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir

    def check(self, receiver: Receiver) -> None:
        """Nothing to ask: reading looks at everything before it begins."""

    def fill(self, receiver: Receiver) -> str:
        """See `WeightSource`."""
        load_into_slab(
            self._model_dir,
            receiver.target,
            shape=receiver.shape,
            dtype=receiver.dtype,
            fingerprint=receiver.fingerprint,
            with_sums=receiver.with_sums,
            threads=receiver.threads,
            progress=receiver.progress(self.name),
        )
        return ""


def receive(receiver: Receiver, sources: Sequence[WeightSource]) -> Received:
    """Fill the receiver's slab from the first of `sources` that fits and does not fail.

    Raises `WeightError` with the reason of every source when none is left."""
    reasons: list[str] = []
    for source in sources:
        began = time.monotonic()
        try:
            source.check(receiver)
            checked = source.fill(receiver)
        except (WeightError, OSError) as error:
            reasons.append(f"{source.name}: {error}")
            continue
        return Received(
            source=source.name,
            refused=tuple(f"not from {reason}" for reason in reasons),
            checked=checked,
            seconds=time.monotonic() - began,
        )
    raise WeightError("the weights cannot be had from any source: " + "; ".join(reasons))


def check_copy(receiver: Receiver, *, sums: str) -> str:
    """Compare the checksums in the receiver's slab with its bytes, all of them or a sample; what
    was compared, in words. `sums` names the checksums. Raises `WeightError` naming the first bad
    chunk."""
    view, layout = receiver.view, receiver.layout
    if digest_of_sums(view, layout) != sums:
        raise WeightError("its checksums are damaged")
    chunks = range(layout.num_chunks)
    looked = chunks if receiver.full_check else sample_of(layout, seed=receiver.seed)
    bad: list[int] = []

    def look(some: Sequence[int]) -> int:
        bad.extend(chunk for chunk in some if bad_chunk(view, layout, chunk))
        return len(some)

    batches = [looked[at : at + CHECK_CHUNKS] for at in range(0, len(looked), CHECK_CHUNKS)]
    run_pieces(batches, look, num_bytes=len(looked), threads=receiver.threads)
    if bad:
        place = layout.chunk(min(bad))
        raise WeightError(
            f"{len(bad)} of {len(looked)} checked chunks have wrong bytes, the first at "
            f"{place.start} to {place.stop}"
        )
    share = len(looked) / len(chunks)
    return (
        f"checksums of {len(looked)} of {len(chunks)} chunks are right: a single bad one "
        f"would be found with a probability of {share:.1%}"
    )
