"""The selection methods by name."""

from __future__ import annotations

from ray_dwm.selection import dsir, mates, random
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.method import Method

METHODS = {
    "random": Method(prepare=random.prepare, choose=highest, targeted=False),
    "dsir": Method(prepare=dsir.prepare, choose=drawn),
    "mates": Method(prepare=mates.prepare, choose=drawn, proxies=True, check_proxy=mates.look_of),
}
