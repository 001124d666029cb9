"""Pixels to a device and arrays back from it, beside its computing: pinned memory, and a stream for each direction.

On one stream a pageable copy of 25 MB keeps a GPU waiting for 4 to 6 ms, most of what a ViT-B in bf16 takes for the
sub-batch that it belongs to. Here nothing waits but who reads the numbers. Pinned memory is PyTorch's own, which gives
a buffer out again once the copies from and into it are done. Without a GPU everything is where it is.
"""

from collections.abc import Mapping

import numpy as np
import torch


class Staging:
    """The way to a device and back; used by the one thread that computes on it."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        if self._on_gpu:
            self._up, self._down = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)

    def upload(self, images: np.ndarray) -> torch.Tensor:
        """Return `images` [b, H, W, 3] uint8 as [b, 3, H, W] on the device; they may change once this returns."""
        if not self._on_gpu:
            return torch.tensor(images).permute(0, 3, 1, 2)
        pinned = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[...] = images
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._up):
            there = pinned.to(self._device, non_blocking=True)
        computing.wait_stream(self._up)
        there.record_stream(computing)
        return there.permute(0, 3, 1, 2)

    def download(self, arrays: Mapping[str, torch.Tensor]) -> "Landing":
        """Begin to copy `arrays` to the host; what they are computed from is on the current stream."""
        if not self._on_gpu:
            return Landing(arrays, None)
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            there = {name: values.to("cpu", non_blocking=True) for name, values in arrays.items()}  # pinned
        for values in arrays.values():
            values.record_stream(self._down)
        done = torch.cuda.Event(blocking=True)  # else the thread that waits would spin on a core
        done.record(self._down)
        return Landing(there, done)


class Landing:
    """Arrays on their way to the host."""

    def __init__(self, arrays: Mapping[str, torch.Tensor], done: torch.cuda.Event | None) -> None:
        self._arrays = arrays
        self._done = done

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait for the copies, in whichever thread, and return them."""
        if self._done is not None:
            self._done.synchronize()
        return {name: values.numpy() for name, values in self._arrays.items()}
