"""The selection methods by name, and the scores of a whole pool by one of them."""

from __future__ import annotations

from collections.abc import Iterable

from ray_dwm.selection import classifier, curriculum, doremi, dsdm, dsir, dwm, mates, perplexity, random
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.method import Arrays, Method, Task
from ray_dwm.selection.scores import Keyed

METHODS = {
    "random": Method(prepare=random.prepare, choose=highest, targeted=False),
    "dsir": Method(prepare=dsir.prepare, choose=drawn),
    "dsdm": Method(prepare=dsdm.prepare, choose=highest, proxies=True),
    "classifier": Method(prepare=classifier.prepare, choose=classifier.choose, depends=classifier.depends),
    "perplexity": Method(
        prepare=perplexity.prepare,
        choose=perplexity.choose,
        targeted=False,
        proxies=True,
        depends=perplexity.depends,
        check=perplexity.check,
    ),
    "curriculum": Method(
        prepare=curriculum.prepare,
        finish=curriculum.finish,
        choose=curriculum.choose,
        targeted=lambda options: options.curriculum.criterion == "similarity",
        proxies=lambda options: options.curriculum.criterion == "perplexity",
        ordered=True,
        depends=curriculum.depends,
        check=curriculum.check,
    ),
    "dwm": Method(
        prepare=dwm.prepare,
        finish=dwm.finish,
        choose=dwm.choose,
        targeted=False,
        depends=dwm.depends,
        elsewhere=("folder",),
        check=dwm.check,
    ),
    "doremi": Method(
        prepare=random.prepare,
        choose=doremi.choose,
        targeted=False,
        domain_weights=True,
        depends=doremi.depends,
        elsewhere=("weights",),
    ),
    "mates": Method(
        prepare=mates.prepare,
        choose=drawn,
        proxies=True,
        check_proxy=mates.look_of,
        depends=mates.depends,
        elsewhere=("stages", "candidates"),
        check=mates.check,
    ),
}


def score(name: str, task: Task) -> Iterable[Arrays]:
    """Sample ids, domains and scores of the pool's rows, block by block in their order."""
    method = METHODS[name]
    scorer = Keyed(method.prepare(task))
    return method.finish(task, task.sweep(f"scores by {name}", str(task.pool.folder), scorer))
