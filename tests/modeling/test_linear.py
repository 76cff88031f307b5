"""Products whose rows do not notice each other (R12): the probe, the padding, the fall-back."""

from itertools import pairwise

import pytest
import torch

from appliance.modeling import linear
from appliance.modeling.linear import (
    REFERENCE_ROWS,
    LinearFactory,
    padded_rows,
    probe_rows,
    row_ladder,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("max_rows", [1, 64, 100, 512, 2048])
def test_the_ladder_rises_to_the_largest_step(max_rows: int) -> None:
    ladder = row_ladder(max_rows)
    assert sorted(set(ladder)) == list(ladder)
    assert ladder[0] == 1
    assert ladder[-1] >= max_rows
    assert REFERENCE_ROWS in ladder
    assert all(b / a <= 2 for a, b in pairwise(ladder))


def test_padding_goes_to_an_allowed_count_or_to_slices_of_them() -> None:
    rows = (4, 8, 16)
    assert [padded_rows(rows, n) for n in (1, 4, 5, 16, 17, 32, 41)] == [4, 4, 8, 16, 20, 32, 48]
    assert padded_rows((), 7) == 7


@pytest.mark.parametrize("path", ["packed", "plain"])
@pytest.mark.parametrize(
    ("n", "k", "biased"), [(96, 64, False), (50, 300, True), (256, 704, False)]
)
def test_R12_a_row_has_the_same_bits_at_every_allowed_row_count(
    path: str, n: int, k: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "plain":
        monkeypatch.setattr(linear, "_packed", lambda weight, bias: None)
    weight, bias = random(n, k), random(n, seed=1) if biased else None
    built = LinearFactory().build(weight, bias, max_rows=128)
    x = random(200, k, seed=2)
    want = built(x[: padded_rows(built.rows, 200)] if len(x) in built.rows else _pad(x, built.rows))
    assert torch.allclose(
        want[:200], torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4
    )
    generator = torch.Generator().manual_seed(3)
    for count in [*range(1, 40), 63, 64, 65, 100, 127, 128, 129, 150, 200]:
        chosen = torch.randperm(200, generator=generator)[:count]
        assert torch.equal(built(_pad(x[chosen], built.rows))[:count], want[chosen]), count


def _pad(x: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    missing = padded_rows(rows, len(x)) - len(x)
    return torch.cat([x, torch.full((missing, x.shape[1]), 7.0)])


def test_row_counts_with_other_bits_are_not_allowed() -> None:
    weight = random(32, 64)

    def product(x: torch.Tensor) -> torch.Tensor:
        y = x @ weight.t()
        return y + 1e-6 if len(x) in (1, 2, 3, 12) else y

    rows = probe_rows(product, weight, max_rows=64)
    assert 64 in rows
    assert not {1, 2, 12} & set(rows)


def test_a_product_that_depends_on_the_place_of_a_row_is_refused() -> None:
    weight = random(32, 64)

    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ weight.t() + torch.arange(len(x)).unsqueeze(1) * 1e-6

    assert probe_rows(product, weight, max_rows=64) == ()


def test_a_wrong_packed_product_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(32, 64)
    monkeypatch.setattr(linear, "_packed", lambda w, b: lambda x: x @ w.t() * 1.001)
    factory = LinearFactory()
    built = factory.build(weight, None, max_rows=64)
    x = random(64, 64)
    assert torch.equal(built(x), torch.nn.functional.linear(x, weight))
    assert any("F.linear" in note for note in factory.notes)


def test_without_a_proof_nothing_is_promised_and_the_operator_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "probe_rows", lambda *args, **kwargs: ())
    factory = LinearFactory()
    assert factory.build(random(8, 8), None, max_rows=64).rows == ()
    assert any("not promised" in note for note in factory.notes)


def test_bfloat16_is_packed_close_and_promises_nothing() -> None:
    weight = random(96, 64)
    built = LinearFactory(invariant=False).build(weight.bfloat16(), None, max_rows=64)
    x = random(9, 64)
    assert built.rows == ()
    assert torch.allclose(built(x.bfloat16()).float(), x @ weight.t(), atol=0.2, rtol=0.05)


def test_the_largest_probed_product_stays_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MAX_PROBE_FLOPS", 2 * 32 * 64 * 100)
    built = LinearFactory().build(random(32, 64), None, max_rows=512)
    assert max(built.rows) <= 100
    x = random(padded_rows(built.rows, 250), 64)
    assert built(x).shape == (len(x), 32)
