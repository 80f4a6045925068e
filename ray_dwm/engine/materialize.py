"""Freshly initialised weights of a sharded model, without the whole of it ever being on one host.

A model is built without values, and every random filling of a parameter is noted. Once it is sharded, the fillings are
repeated in their order, one tensor at a time, and each rank keeps its part: the weights are those that building the
whole model gives, for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Model = TypeVar("Model", bound=nn.Module)


class Filling(NamedTuple):
    """One random filling of a parameter; `name` is "" where the parameter was replaced later, as a tied one is."""

    name: str
    shape: torch.Size
    fill: Callable[..., Any]
    arguments: tuple[Any, ...]


class _Notes(TorchDispatchMode):
    """Lets what is made empty have no memory, and notes what it is filled with."""

    def __init__(self) -> None:
        super().__init__()
        self.fillings: list[tuple[Tensor, Callable[..., Any], tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is aten.empty.memory_format:
            kwargs = {**kwargs, "device": torch.device("meta")}
        elif function in (aten.normal_.default, aten.uniform_.default):
            self.fillings.append((args[0], function, args[1:]))
        return function(*args, **kwargs)


def without_values(build: Callable[[], Model]) -> tuple[Model, list[Filling]]:
    """A model on the meta device, but for what is not random, and the fillings that `materialize` repeats."""
    with _Notes() as notes:
        model = build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return model, [Filling(names.get(id(t), ""), t.shape, fill, arguments) for t, fill, arguments in notes.fillings]


@torch.no_grad()
def materialize(model: nn.Module, fillings: list[Filling], seed: int, device: torch.device) -> None:
    """Give a transformers model that was built `without_values` and then sharded by FSDP2 its values, on `device`."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    model.tie_weights()  # type: ignore[operator]  # the line before has made two of one
    parameters = dict(model.named_parameters())
    last = {filling.name: index for index, filling in enumerate(fillings)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, (name, shape, fill, arguments) in enumerate(fillings):
            whole = fill(torch.empty(shape), *arguments)
            if name and index == last[name]:
                parameter = parameters[name]
                assert isinstance(parameter, DTensor)
                mesh, placements = parameter.device_mesh, parameter.placements
                # Every rank has drawn the same: nothing need be sent.
                parameter.copy_(distribute_tensor(whole.to(device), mesh, placements, src_data_rank=None))
