"""The selection methods by name, and the scores of a whole pool by one of them."""

from __future__ import annotations

from collections.abc import Iterable

from ray_dwm.selection import classifier, dsir, random
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.method import Arrays, Method, Task
from ray_dwm.selection.scores import Keyed

METHODS = {
    "random": Method(prepare=random.prepare, choose=highest, targeted=False),
    "dsir": Method(prepare=dsir.prepare, choose=drawn),
    "classifier": Method(prepare=classifier.prepare, choose=classifier.choose, depends=classifier.depends),
}


def score(name: str, task: Task) -> Iterable[Arrays]:
    """Sample ids, domains and scores of the pool's rows, block by block in their order."""
    method = METHODS[name]
    scorer = Keyed(method.prepare(task))
    return method.finish(task, task.sweep(f"scores by {name}", str(task.pool.folder), scorer))
