"""`appliance profile` measures a device, and a server that reads the file predicts at once."""

import json
from pathlib import Path

import msgspec
import pytest

from appliance.cli import main
from appliance.config import Config, ConfigError, from_table
from appliance.core.profiles import device_profile
from appliance.core.step_model import PredictionError, StepCoefficients, StepModel
from appliance.cost_profile import CostProfile, load_coefficients, write_profile
from appliance.devices import plan_devices
from appliance.profiling import STEPS, groups
from appliance.startup import Machine, make_plan
from appliance.wiring import dispatcher_config

COEFFICIENTS = StepCoefficients(planes=((0.1, 0.2, 0.3, 0.4, 0.5), (1.0, 0.0, 0.0, 0.0, 0.0)))


def a_profile() -> CostProfile:
    return CostProfile(
        devices="cpu:1",
        model="tiny",
        dtype="float32",
        coefficients=COEFFICIENTS,
        error=PredictionError(mean_relative=0.01, p90_relative=0.02, num_steps=3),
    )


def config(path: str) -> Config:
    return from_table({"devices": {"spec": "paced:1@cpu", "cost_profile": path}})


def test_a_profile_goes_from_the_file_to_every_model_of_steps(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    write_profile(a_profile(), path)
    settings = config(str(path))
    devices = plan_devices(settings.devices.spec, cores=2, count_gpus=lambda: 0)
    plan = make_plan(settings, devices, machine=Machine(cores=2, free_bytes=1 << 34))
    assert plan.steps == COEFFICIENTS
    assert dispatcher_config(plan).steps == COEFFICIENTS  # of the node, and of each worker's start
    assert load_coefficients("") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"{", "truncated"),
        (b"[]", "Expected"),
        (msgspec.json.encode(msgspec.structs.replace(a_profile(), format="other")), "format"),
        (
            msgspec.json.encode(
                msgspec.structs.replace(
                    a_profile(),
                    coefficients=StepCoefficients(planes=((-1.0, 0, 0, 0, 0), (1.0, 0, 0, 0, 0))),
                )
            ),
            "at least 0",
        ),
        (
            msgspec.json.encode(
                msgspec.structs.replace(
                    a_profile(),
                    coefficients=StepCoefficients(planes=((0.0, 1, 0, 0, 0), (0.0, 1, 0, 0, 0))),
                )
            ),
            "empty step",
        ),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_the_fix(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "cost.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_coefficients(str(path))
    text = str(caught.value)
    assert "devices.cost_profile" in text
    assert words in text
    assert "appliance profile" in text


@pytest.mark.parametrize(
    ("seqs", "longest", "tokens"), [(1, 64, 100), (64, 4096, 65536), (256, 16384, 900_000)]
)
def test_only_what_fits_is_measured(seqs: int, longest: int, tokens: int) -> None:
    found = groups(max_num_seqs=seqs, longest=longest, kv_tokens=tokens)
    assert found
    for group in found:
        assert group.num_seqs + group.running <= seqs
        assert group.prompt + group.answer < longest
        assert group.num_seqs * (group.prompt + group.answer) <= tokens
    if seqs >= 64:
        assert any(group.running for group in found)
        assert any(group.num_seqs == 64 and group.answer == STEPS for group in found)


def test_a_profile_of_what_is_asked_wrongly_ends_with_a_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["profile", "--devices", "abacus"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("appliance: devices.spec")


@pytest.mark.procs
@pytest.mark.slow
def test_the_profile_of_a_paced_worker_is_that_of_its_device(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    words = ["--devices", "paced:1@h200-8b", "--set", "batch.max_num_seqs=32"]
    assert main(["profile", *words, "--json", str(path)]) == 0
    document = json.loads(path.read_bytes())
    assert document["seen"]
    coefficients = load_coefficients(str(path))
    assert coefficients is not None
    model, device = StepModel(coefficients), device_profile("h200-8b")
    truth = device.step_seconds(num_tokens=16, num_samples=16, num_pairs=16384, num_kv_tokens=16384)
    assert model.seconds(decodes=16, context_tokens=16384) == pytest.approx(truth, rel=0.25)
