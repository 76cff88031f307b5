"""The fit behind `appliance.core.step_model`: cells of like steps, and two planes through them.

A *cell* keeps the mean of recent steps whose counts are alike up to a factor of two or four. Each
plane is the weighted least squares of relative errors over the cells in which it is the larger one,
or nearly so, non-negative by coordinate descent on the normal equations. Those are kept up to date
cell by cell: a step changes one cell, looks at an old one again, and takes two rounds of descent,
so it costs the same however many cells there are. Cells that are seen no more fade; those of the
guess (or of the measured profile) that the model began with fade quickly.
"""

from collections.abc import Sequence

Row = tuple[float, float, float, float, float]
"""1, prompt tokens, pairs, decodes, KV tokens read; or a coefficient for each."""

_SCALES: Row = (1.0, 256.0, 131072.0, 32.0, 32768.0)
"""Usual counts, so that coordinate descent sees numbers of one size."""
_WINDOW = 20.0
"""Steps that a cell remembers."""
_HALF_LIFE = 4000.0
"""Steps until a cell that is not seen counts half."""
_GUESS_HALF_LIFE = 60.0
_LEAST_WEIGHT = 1e-3
_ALWAYS = 256
"""So many first steps are all fitted, then one in `_EVERY`."""
_EVERY = 4
_NEARLY = 0.97
_FEW = 4
"""Steps of a cell that are taken as they are."""


class _Cell:
    """Steps with like counts: means over the recent ones. Seconds are free of the factor `s`."""

    __slots__ = (
        "count",
        "guessed",
        "in_first",
        "in_second",
        "row",
        "seconds",
        "seen_at",
        "share",
    )

    def __init__(self, row: Row, seconds: float, *, count: float, seen_at: int) -> None:
        self.row = row
        self.seconds = seconds
        self.count = count
        self.seen_at = seen_at
        self.guessed = False
        self.in_first = False
        self.in_second = False
        """In which planes' equations it is."""
        self.share: tuple[float, Row] = (0.0, row)
        """Its weight and its row (scaled, per second) there."""


class _Plane:
    """Coefficients (of scaled counts) and the normal equations they solve."""

    __slots__ = ("gram", "k", "sums")

    def __init__(self, k: Sequence[float]) -> None:
        self.k = list(k)
        self.gram = [[0.0] * 5 for _ in range(5)]
        self.sums = [0.0] * 5

    def add(self, weight: float, row: Row) -> None:
        """Take in (or, with a negative weight, out) a row whose value should be 1."""
        a, b, c, d, e = row
        for index, value in enumerate(row):
            if value:
                part = weight * value
                line = self.gram[index]
                line[0] += part * a
                line[1] += part * b
                line[2] += part * c
                line[3] += part * d
                line[4] += part * e
                self.sums[index] += part

    def descend(self) -> None:
        """One round of coordinate descent."""
        k = self.k
        for index, line in enumerate(self.gram):
            most = line[index]
            if most > 1e-12:
                a, b, c, d, e = line
                got = a * k[0] + b * k[1] + c * k[2] + d * k[3] + e * k[4]
                wanted = k[index] + (self.sums[index] - got) / most
                k[index] = wanted if wanted > 0.0 else 0.0

    def coefficients(self) -> Row:
        """Per count."""
        a, b, c, d, e = (k / scale for k, scale in zip(self.k, _SCALES, strict=True))
        return a, b, c, d, e

    def value(self, row: Row) -> float:
        """Of a scaled row."""
        a, b, c, d, e = row
        k = self.k
        return a * k[0] + b * k[1] + c * k[2] + d * k[3] + e * k[4]


class StepFit:
    """Learns seconds of steps from rows of counts. What `coefficients` say holds for seconds
    divided by whatever factor the caller keeps."""

    def __init__(self, planes: tuple[Row, Row], *, trust: float) -> None:
        """`planes`: what is believed before there are steps, with the weight of `trust` steps in
        each of some dozen cells."""
        self._planes = tuple(
            _Plane([k * scale for k, scale in zip(plane, _SCALES, strict=True)]) for plane in planes
        )
        self._cells: dict[int, _Cell] = {}
        self._order: list[_Cell] = []
        self._next = 0
        self._num = 0
        first, second = planes
        for n, prefix, decodes, mean in _grid():
            pairs = n * prefix + n * (n + 1) / 2
            row = (1.0, n, pairs, decodes, decodes * mean + (prefix if n else 0))
            seconds = max(_product(first, row), _product(second, row))
            cell = self._gather(cell_key(row, prefix), row, seconds)
            cell.guessed = True
            cell.count = trust
            self._place(cell)

    @property
    def coefficients(self) -> tuple[Row, Row]:
        """Of the two planes, per count."""
        first, second = self._planes
        return first.coefficients(), second.coefficients()

    def alike(self, key: int) -> tuple[Row, float] | None:
        """Mean counts and seconds of the steps of that cell; None unless there are several."""
        cell = self._cells.get(key)
        return (cell.row, cell.seconds) if cell is not None and cell.count > _FEW else None

    def learn(self, key: int, row: Row, seconds: float) -> bool:
        """Take in a step of that cell. True: the coefficients have changed."""
        self._num += 1
        cell = self._gather(key, row, seconds)
        if self._num > _ALWAYS and self._num % _EVERY:
            return False
        self._place(cell)
        self._next = (self._next + 1) % len(self._order)
        self._place(self._order[self._next])
        for plane in self._planes:
            plane.descend()
            plane.descend()
        return True

    def settle(self, rounds: int) -> None:
        """Fit until nothing moves: for profiles, not for serving."""
        for _ in range(rounds):
            for cell in self._order:
                self._place(cell)
            for plane in self._planes:
                for _ in range(5):
                    plane.descend()

    def seen(self) -> list[tuple[Row, float, int]]:
        """Mean counts and seconds of the steps in each cell, and how many of them it remembers."""
        cells = (cell for cell in self._order if not cell.guessed)
        return [(cell.row, cell.seconds, int(cell.count)) for cell in cells]

    def _gather(self, key: int, row: Row, seconds: float) -> _Cell:
        """Put a step into its cell."""
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell(row, seconds, count=1.0, seen_at=self._num)
            self._order.append(cell)
            return cell
        if cell.guessed:
            cell.guessed = False
            cell.row, cell.seconds, cell.count = row, seconds, 1.0
        else:
            cell.count = count = min(_WINDOW, cell.count + 1.0)
            rate = 1.0 / count
            old = cell.row
            cell.row = (
                1.0,
                old[1] + rate * (row[1] - old[1]),
                old[2] + rate * (row[2] - old[2]),
                old[3] + rate * (row[3] - old[3]),
                old[4] + rate * (row[4] - old[4]),
            )
            cell.seconds += rate * (seconds - cell.seconds)
        cell.seen_at = self._num
        return cell

    def _place(self, cell: _Cell) -> None:
        """Bring a cell up to date in the equations of each plane that is the larger one there, or
        nearly: one that nothing held would rise above cells that are not its own."""
        first, second = self._planes
        weight, row = cell.share
        if cell.in_first:
            first.add(-weight, row)
        if cell.in_second:
            second.add(-weight, row)
        _, b, c, d, e = cell.row
        per = 1.0 / cell.seconds
        row = (
            per,
            b * per / _SCALES[1],
            c * per / _SCALES[2],
            d * per / _SCALES[3],
            e * per / _SCALES[4],
        )
        half_life = _GUESS_HALF_LIFE if cell.guessed else _HALF_LIFE
        age = (self._num - cell.seen_at) / half_life
        weight = max(_LEAST_WEIGHT, cell.count * 0.5**age)
        cell.share = (weight, row)
        one, two = first.value(row), second.value(row)
        cell.in_first = one >= _NEARLY * two
        cell.in_second = two >= _NEARLY * one
        if cell.in_first:
            first.add(weight, row)
        if cell.in_second:
            second.add(weight, row)


def cell_key(row: Row, prefix: float) -> int:
    """Of the cell of a step with these counts, and so many tokens before its chunk."""
    _, n, _, decodes, read = row
    mean = int(read) // int(decodes) if decodes else 0
    alone = int(n).bit_length() << 18 | int(decodes).bit_length() << 12
    return alone | (int(prefix).bit_length() + 1) // 2 << 6 | (mean.bit_length() + 1) // 2


def _product(plane: Row, row: Row) -> float:
    return sum(k * count for k, count in zip(plane, row, strict=True))


def _grid() -> list[tuple[int, int, int, int]]:
    """Counts that stand for all: prompt tokens, prefix, decodes, mean context."""
    decoding = [(0, 0, b, mean) for b in (1, 8, 64, 256) for mean in (64, 1024, 8192)]
    prefilling = [
        (n, prefix, b, 1024 if b else 0)
        for n in (1, 16, 64, 256, 1024, 4096)
        for prefix in (0, 4096)
        for b in (0, 8, 128)
    ]
    return decoding + prefilling
