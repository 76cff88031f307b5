"""The journal on disk never holds anybody up."""

from pathlib import Path

import pytest

from appliance.live.journal_file import JournalFile, JournalFileError


def test_lines_are_written_in_order(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "j")
    for number in range(1000):
        file.write(b"%d" % number)
    file.close()
    assert (tmp_path / "j").read_bytes().split() == [b"%d" % number for number in range(1000)]
    assert file.dropped == 0


@pytest.mark.parametrize("line_bytes", [10, 100_000])
def test_a_disk_that_is_full_is_logged_and_harms_nobody(
    line_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = JournalFile(Path("/dev/full"))
    for _ in range(100):
        file.write(b"x" * line_bytes)
    file.close()
    assert "No space left on device" in str([vars(record) for record in caplog.records])


def test_when_too_many_lines_wait_further_ones_are_dropped(tmp_path: Path) -> None:
    file = JournalFile(tmp_path / "j", max_queued=0)
    file.write(b"x")
    file.close()
    assert file.dropped == 1


def test_r20_a_path_that_cannot_be_opened_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(JournalFileError, match=r"\[journal\] path .*No such file or directory"):
        JournalFile(tmp_path / "no" / "such" / "file")
