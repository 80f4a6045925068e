"""What a selection method is made of.

A method turns the pool and the target sets into a scorer, a small function that is then applied to every row of the
pool; from the scores of all rows it chooses the rows that fit the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import Rows

Arrays = Mapping[str, NDArray[Any]]
"""Named arrays: what one unit of work results in."""
RowFunction = Callable[[Rows], Arrays]
"""Made of plain values, so that it travels to other processes; what is heavy it loads there, once."""


class Sweep(Protocol):
    """Applies a function to the rows of a set, in blocks; where that happens is not the method's matter."""

    def __call__(
        self, name: str, folder: str, function: RowFunction, rows: NDArray[np.int64] | None = None, block: int = 0
    ) -> Iterator[Arrays]:
        """The function's results, block by block in the order of the rows.

        Args:
            name: says what is being done.
            rows: the rows that it is done with, by number; None: all.
            block: rows in a block; 0: as the options say.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One selection."""

    options: SelectionConfig
    seed: int
    pool: Manifest
    targets: Mapping[str, Manifest]
    """Name -> target set; several count the same."""
    sweep: Sweep
    notes: dict[str, Any] = field(default_factory=dict)
    """What the method has to say of itself; it is kept in selection.json."""
    scratch: str = ""
    """A folder that all processes see, for what would else be made twice; empty: there is none."""
    proxies: tuple[str, ...] = ()
    """Hugging Face folders of the proxy LMs, checked, where the method needs some."""
    domain_weights: Mapping[str, float] | None = None
    """Domain -> its part of what is selected, where the method goes by that."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The pool's rows with their scores. n = rows."""

    scores: NDArray[np.float64]
    """(n,), the higher the more wanted."""
    domains: NDArray[np.int32]
    """(n,) codes into the pool's sorted domain names."""

    def __len__(self) -> int:
        return len(self.scores)


def as_they_are(task: Task, blocks: Iterable[Arrays]) -> Iterable[Arrays]:
    """See Method.finish."""
    del task
    return blocks


def nothing_more(options: SelectionConfig, pool: Manifest, count: int) -> None:
    """See Method.check."""
    del options, pool, count


def any_proxy(folder: Path) -> None:
    """See Method.check_proxy."""
    del folder


When = bool | Callable[[SelectionConfig], bool]
"""Always, never, or under some options."""


def applies(when: When, options: SelectionConfig) -> bool:
    """Whether it is so under these options."""
    return when if isinstance(when, bool) else when(options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A selection method."""

    prepare: Callable[[Task], RowFunction]
    """Makes the scorer, whose result has `score` (n,) and, if it likes, further columns to be kept with the scores."""
    finish: Callable[[Task, Iterable[Arrays]], Iterable[Arrays]] = as_they_are
    """Turns what the scorer made of all rows, block by block, into scores, where these depend on other rows too."""
    choose: Callable[[Task, Scored, int], NDArray[np.int64]]
    """Chooses so many rows; they are written in the order in which it returns them."""
    targeted: When = True
    """Whether it needs a target set."""
    proxies: When = False
    """Whether it looks through proxy LMs."""
    check_proxy: Callable[[Path], object] = any_proxy
    """Refuses, before anything is scored, a proxy's folder in which the method does not find what it needs."""
    domain_weights: bool = False
    """Whether it goes by domain weights, which LMs learn beforehand."""
    ordered: bool = False
    """Whether the order of the chosen rows matters: training then reads them in that order."""
    depends: Callable[[SelectionConfig], dict[str, Any]] | None = None
    """What its scores depend on beside seed, pool and target sets, files' contents included; None: all its options."""
    elsewhere: tuple[str, ...] = ()
    """Its options that do not decide the choice: of a run in stages, or names of what counts by its content."""
    check: Callable[[SelectionConfig, Manifest, int], None] = nothing_more
    """Refuses, before anything is scored, options that do not fit the pool or the number of rows."""
