"""Tensors that are made again in backward instead of being kept for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def made_again(tensor_of: dict[int, Callable[..., Tensor]], kept: Tensor | None = None) -> Iterator[None]:
    """Within it autograd saves no tensor whose storage is a key (its data_ptr), nor a view of one: the function makes it again in backward.

    `kept`, if given, is saved in its stead and handed to the function. Of nested hooks torch runs the inner ones alone, so what is not
    ours goes to the outer ones, those of activation checkpointing.
    """
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack, unpack = outer or (_same, _same)
    read = [] if kept is None else [kept]

    def drop(tensor: Tensor) -> Any:  # matches views too, such as the transpose that a linear saves
        make = tensor_of.get(tensor.untyped_storage().data_ptr())
        if make is None or tensor.numel() == 0:  # all tensors without elements are at one address
            return pack(tensor)
        return _Dropped(make, [pack(t) for t in read], tensor.shape, tensor.stride(), tensor.storage_offset())

    def restore(saved: Any) -> Tensor:
        if not isinstance(saved, _Dropped):
            return unpack(saved)
        return saved.make(*(unpack(t) for t in saved.read)).as_strided(saved.shape, saved.stride, saved.storage_offset)

    try:
        with saved_tensors_hooks(drop, restore):
            yield
    finally:
        read.clear()  # torch holds on to the hooks, which must not hold what checkpointing lets go


class _Dropped(NamedTuple):
    make: Callable[..., Tensor]
    read: list[Any]  # what it is made from, as the outer hooks packed it
    shape: torch.Size
    stride: tuple[int, ...]
    storage_offset: Any


def _same(tensor: Tensor) -> Tensor:
    return tensor
