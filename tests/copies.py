"""What a function copies to a device."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Copies(TorchFunctionMode):
    """Keeps the names of calls that bring numbers from a Python list or from another device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        devices = {one.device for one in (*args, made) if isinstance(one, Tensor)}
        if func is torch.tensor or len(devices) > 1:
            self.copies.append(func.__name__)
        return made
