"""The selection methods by name."""

from __future__ import annotations

from ray_dwm.selection import doremi, dsir, random
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.method import Method

METHODS = {
    "random": Method(prepare=random.prepare, choose=highest, targeted=False),
    "dsir": Method(prepare=dsir.prepare, choose=drawn),
    "doremi": Method(prepare=random.prepare, choose=doremi.choose, targeted=False, domain_weights=True),
}
