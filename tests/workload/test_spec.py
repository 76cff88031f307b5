"""Specifications: the built-in one, files, and words for what is wrong in them."""

import json
from pathlib import Path

import pytest

from appliance.core.types import OnMiss
from appliance.workload.lengths import FixedLengths, LengthTable, LognormalLengths
from appliance.workload.spec import Calibration, SpecError, class_slos, load_spec

TARGETS = {
    "chat": (0.40, 1.0, 0.05, None),
    "code": (0.20, 0.5, 0.03, None),
    "summarisation": (0.15, 4.0, 0.15, None),
    "reasoning": (0.10, 2.0, 0.03, None),
    "batch": (0.15, None, None, 120.0),
}
LENGTHS = {
    "chat": "azure23_conv",
    "code": "azure23_code",
    "summarisation": "arxiv_summ_lengths",
    "batch": "azure23_conv",
}


def test_five_is_the_five_classes() -> None:
    spec = load_spec("five")
    found = {one.name: (one.share, one.ttft, one.tpot, one.e2e) for one in spec.classes}
    assert found == TARGETS
    assert sum(one.share for one in spec.classes) == pytest.approx(1.0)
    for one in spec.classes:
        if one.name == "reasoning":
            assert one.lengths == LognormalLengths(
                prompt_median=400, prompt_sigma=1.2, output_median=600, output_sigma=0.9
            )
        else:
            assert isinstance(one.lengths, LengthTable)
            assert one.lengths.name == LENGTHS[one.name]
    slos = class_slos(spec)
    assert slos["chat"].ttft == 1.0
    assert slos["batch"].e2e == 120.0


def test_relative_targets_come_from_a_calibration() -> None:
    calibration = Calibration(a=0.01, b=0.0002, tpot0=0.005)
    unloaded = 0.01 + 0.0002 * 1000
    found = {}
    for one in load_spec("five").classes:
        slo = one.slo(1000, calibration=calibration)
        found[one.name] = (slo.ttft, slo.tpot, slo.e2e)
    assert found["chat"] == pytest.approx((5 * unloaded + 0.05, 2 * 0.005, None))
    assert found["code"] == pytest.approx((3 * unloaded + 0.05, 1.2 * 0.005, None))
    assert found["summarisation"] == pytest.approx((10 * unloaded + 0.05, 5 * 0.005, None))
    assert found["reasoning"] == pytest.approx((5 * unloaded + 0.05, 1.2 * 0.005, None))
    assert found["batch"] == (None, None, 120.0)


def test_a_file_may_hold_the_calibration(tmp_path: Path) -> None:
    file = tmp_path / "relative.toml"
    words = "calibration = { a_ms = 8.0, b_ms = 0.03, tpot0_ms = 5.0 }"
    file.write_text(FILE.replace("slo_scale = 0.4", words))
    spec = load_spec(str(file))
    assert spec.calibration == Calibration(a=0.008, b=0.03 / 1000, tpot0=0.005)
    file.write_text(FILE.replace("slo_scale = 0.4", words.replace("b_ms", "b_s")))
    with pytest.raises(SpecError, match=r"calibration\.b_s: there is no such field"):
        load_spec(str(file))


FILE = """
name = "mine"
arrivals = "gamma:2"
length_scale = 0.5
max_len = 4000
slo_scale = 0.4
[[class]]
name = "a"
share = 3
lengths = "azure23_code"
ttft_ms = 250
on_miss = "refuse"
[[class]]
name = "b"
share = 1
lengths = { prompt = 10, output = 20 }
e2e_ms = 1000
"""


def test_a_file_gives_any_specification_and_toml_and_json_are_alike(tmp_path: Path) -> None:
    toml = tmp_path / "mine.toml"
    toml.write_text(FILE)
    spec = load_spec(str(toml))
    assert (spec.name, spec.arrivals, spec.max_len) == ("mine", "gamma:2", 4000)
    first, second = spec.classes
    assert first.slo(scale=spec.slo_scale).ttft == pytest.approx(0.1)
    assert first.on_miss is OnMiss.REFUSE
    assert second.lengths == FixedLengths(prompt=10, output=20)
    import tomllib

    as_json = tmp_path / "mine.json"
    as_json.write_text(json.dumps(tomllib.loads(FILE)))
    assert load_spec(str(as_json)) == spec


def test_a_file_without_a_name_is_called_like_the_file(tmp_path: Path) -> None:
    file = tmp_path / "nameless.toml"
    file.write_text(FILE.replace('name = "mine"\n', ""))
    assert load_spec(str(file)).name == "nameless"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("slo_scale", "slo_scal", r"slo_scal: there is no such field; did you mean 'slo_scale'"),
        ("ttft_ms = 250", "ttft = 250", r"class\[0\].ttft: there is no such field; did you mean"),
        ("ttft_ms = 250", "ttft_ms = -1", r"class\[0\].ttft_ms = -1: "),
        ("ttft_ms = 250", 'ttft_ms = "x"', r"class\[0\].ttft_ms = 'x': Expected"),
        ("share = 3\n", "", r"class\[0\].share: is missing"),
        ("share = 3", "share = 0", r"class\[0\].share = 0: "),
        ('"azure23_code"', '"azure23"', r"class\[0\].lengths = 'azure23': did you mean"),
        ("output = 20", "outpt = 20", r"class\[1\].lengths.outpt: .* did you mean 'output'"),
        ("output = 20", "output = 0", r"class\[1\].lengths.output = 0: "),
        ('"gamma:2"', '"gamma:x"', r"arrivals = 'gamma:x': .*must be a number"),
        ('name = "b"', 'name = "a"', r"class: two are named 'a'"),
        ('"refuse"', '"drop"', r"class\[0\].on_miss = 'drop'"),
        ("length_scale = 0.5", "length_scale = 0", r"length_scale = 0: "),
        ("[[class]]", "[[class", r"is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    file = tmp_path / "wrong.toml"
    assert old in FILE
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(SpecError, match=words) as error:
        load_spec(str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"class": 3}', '{"class": []}', "{}"])
def test_odd_json_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.json"
    file.write_text(text)
    with pytest.raises(SpecError, match=r"odd\.json: "):
        load_spec(str(file))


def test_a_file_that_is_not_there_is_named_beside_the_built_in_one() -> None:
    with pytest.raises(SpecError, match=r'nowhere: no such file, and .* "five"'):
        load_spec("nowhere")
