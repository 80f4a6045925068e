"""Cells at once: as many as there is room for."""

from __future__ import annotations

from pathlib import Path

from orchestration.test_experiment import declare

from ray_dwm.config.experiment import Cell
from ray_dwm.orchestration.experiment import choose
from ray_dwm.orchestration.pool import Pool


def test_a_pool_starts_only_what_fits_beside_the_others(shards: dict[str, Path], tmp_path: Path) -> None:
    config = declare(shards, tmp_path)
    cells = choose(config, ["uniform", "frozen"], [])
    small, large = {"CPU": 2.0, "GPU": 0.0}, {"CPU": 5.0, "GPU": 0.0}
    asked = {cell: small if cell.method == "uniform" else large for cell in cells}
    pool = Pool(config, asked, 3, "")
    started: list[str] = []

    def start(cell: Cell) -> None:
        started.append(cell.path)
        pool._waiting.remove(cell)
        pool._running[cell] = None  # type: ignore[assignment]

    room = {"CPU": 7.0}
    while (cell := pool._startable(room)) is not None:
        start(cell)
    # One small and one large; the frozen ones wait for what they need, and nothing else fits.
    assert started == ["tiny/uniform/seed-0", "tiny/dwm/seed-0"]
    pool._running.clear()
    assert pool._startable({"CPU": 1.0}) is not None  # alone, whatever is counted: it was checked before
