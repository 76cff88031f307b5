"""`appliance key`: what it prints admits its key, and only a person sees the key."""

import hashlib
import tomllib

import pytest

from appliance.cli import main
from appliance.config import ConfigError, from_table
from appliance.keys import PREFIX, entry, make_key


def test_the_entry_admits_the_key_that_was_shown(capsys) -> None:
    assert main(["key", "--name", "alice"]) == 0
    said = capsys.readouterr()
    (found,) = from_table(tomllib.loads(said.out)).key
    shown = said.err.split()[-1]
    assert (found.name, found.admin) == ("alice", False)
    assert found.sha256 == hashlib.sha256(shown.encode()).hexdigest()
    assert shown.startswith(PREFIX)
    assert shown not in said.out


def test_an_admin_key_says_so(capsys) -> None:
    assert main(["key", "--name", "root", "--admin"]) == 0
    (found,) = from_table(tomllib.loads(capsys.readouterr().out)).key
    assert found.admin


def test_entries_follow_each_other_in_one_file() -> None:
    text = entry("one", name="a") + entry("two", name="b", admin=True)
    assert [key.name for key in from_table(tomllib.loads(text)).key] == ["a", "b"]


def test_R20_a_name_that_cannot_be_one_is_refused(capsys) -> None:
    assert main(["key", "--name", "al ice"]) == 2
    assert "name = 'al ice'" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        entry("k", name='a"\nb')


def test_keys_have_256_bits_and_no_two_are_equal() -> None:
    asked = []
    assert make_key(lambda size: asked.append(size) or "x") == PREFIX + "x"
    assert asked == [32]
    assert make_key() != make_key()
