"""Checkpoints shared by the tests of this directory."""

import pytest

from tests.modeling.checkpoints import CheckpointStore


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    """Directory of a variant's checkpoint, by the variant's name."""
    return CheckpointStore(tmp_path_factory)
