"""Is a network of one's own fit to be cached? Asked once, when it is loaded, of a few made-up pictures.

A build writes the same bytes however it is cut into batches and however often it is killed: a network whose tokens
depend on its neighbours in a batch, or on chance, cannot be in a cache.
"""

from collections.abc import Callable, Sequence

import torch

from ...cache_specs.errors import UsageError
from .own_modules import cause

NUM = 3
SEED = 0
# Of the largest difference, in the values' root mean square: other kernels for another batch size round otherwise. A
# batch norm left in training mode, or attention across the batch, is at 0.1 and more.
TOLERANCE = {"fp32": 1e-2, "tf32": 3e-2, "bf16": 0.1}


def check_network(
    what: str, run: Callable[[torch.Tensor], Sequence[torch.Tensor]], *, side: int, precision: str, hint: str = ""
) -> None:
    """Run a network on pictures [3, 3, side, side] uint8; raise `UsageError` where what it gives cannot be cached.

    `run` returns tensors of the batch, shapes checked; `what` begins the error, `hint` ends that of a failing network.
    """
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.rand(NUM, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = torch.rand(NUM, 3, side, side, generator=generator)
    images = ((0.8 * smooth + 0.2 * noise) * 255).to(torch.uint8)
    try:
        first, again, alone = run(images), run(images), run(images[:1])
    except UsageError:
        raise
    except Exception as error:  # whatever a network raises; the cause is in the line
        raise UsageError(f"{what}: fails on pictures of {side} x {side} pixels ({cause(error)}){hint}") from error
    for values, same, one in zip(first, again, alone, strict=True):
        if not values.isfinite().all():
            raise UsageError(f"{what}: its values are not finite for made-up pictures of {side} x {side} pixels")
        if not torch.equal(values, same):
            raise UsageError(
                f"{what}: two calls on the same pictures differ by up to {float((values - same).abs().max()):.3g}; a "
                "cache needs the same bits each time (dropout, or a random number?)"
            )
        size = float(values.double().square().mean().sqrt())
        difference = float((values[:1].double() - one.double()).abs().max())
        if difference > TOLERANCE[precision] * max(size, 1e-12):
            raise UsageError(
                f"{what}: a picture alone and the same one in a batch of {NUM} differ by up to {difference:.3g}, "
                f"values are about {size:.3g}; a cache must not depend on the batch (batch norm in training mode?)"
            )
