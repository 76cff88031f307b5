"""Memory files: shared by descriptor, sized once, gone when closed."""

import mmap
import os
import resource

import pytest

from appliance.live.slabs import Slab, SlabError


def test_what_one_mapping_writes_another_reads_and_untouched_pages_cost_nothing() -> None:
    slab = Slab("test", 1 << 24)
    try:
        assert slab.resident_bytes() == 0
        with mmap.mmap(slab.fd, slab.num_bytes) as one, mmap.mmap(slab.fd, slab.num_bytes) as two:
            one[5] = 42
            assert two[5] == 42
        assert 0 < slab.resident_bytes() < slab.num_bytes
    finally:
        slab.close()
        slab.close()


def test_a_worker_cannot_change_the_size_under_the_others() -> None:
    slab = Slab("test", 4096)
    try:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(slab.fd, size)
    finally:
        slab.close()


def test_r20_a_slab_that_cannot_be_made_names_size_and_setting() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SlabError, match=r"kv slab of 8192 bytes .*lower \[kv\] memory"):
            Slab("kv", 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
