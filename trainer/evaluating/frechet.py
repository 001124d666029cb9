"""How far apart two clouds of features are: Frechet distance, precision and recall, in float64.

The Frechet distance of Gaussians (Heusel et al., arXiv 1706.08500) is called FID only in the space of one Inception
network; here it is in an encoder's space, and what it is called says which.
"""

import numpy as np
import torch

from ...cache_specs.errors import UsageError

_BLOCK_BYTES = 2**26  # of distances at a time


def check_number(num: int, width: int, what: str) -> None:
    """Raise UsageError where `num` samples cannot have a covariance of full rank in `width` dimensions."""
    if num <= width:
        raise UsageError(
            f"{what}: {num} for features of {width} channels. A covariance of no more samples than channels is "
            f"singular, and the Frechet distance then measures the number of samples; take at least {width + 1}"
        )


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Return |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two clouds [N, E] and [M, E], N and M above E.

    tr (C C')^(1/2) is the sum of the square roots of the eigenvalues of S C' S with S = C^(1/2): both are symmetric,
    so no complex square root is ever taken.
    """
    for what, cloud in (("real", real), ("generated", generated)):
        if cloud.ndim != 2 or cloud.shape[1] != real.shape[1]:
            raise UsageError(f"{what} features are {list(cloud.shape)}; expected [N, {real.shape[-1]}]")
        check_number(len(cloud), cloud.shape[1], f"{what} images")
        if not np.isfinite(cloud).all():
            raise UsageError(f"{what} features: a value is not finite")
    (mean, covariance), (mean2, covariance2) = map(_moments, (real, generated))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    mixed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance2 @ root), 0)).sum()
    between = mean - mean2
    return float(max(between @ between + np.trace(covariance) + np.trace(covariance2) - 2 * mixed, 0.0))


def _moments(cloud: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide = cloud.astype(np.float64)
    return wide.mean(0), np.atleast_2d(np.cov(wide, rowvar=False))


def precision_recall(real: np.ndarray, generated: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Return precision and recall of `generated` [M, E] against `real` [N, E] (arXiv 1904.06991).

    The manifold of a cloud is the union of balls around its points that reach their k-th nearest other point.
    Precision is the share of generated points in the real manifold, recall that of real points in the generated one.
    """
    for what, cloud in (("real", real), ("generated", generated)):
        if len(cloud) <= neighbours:
            raise UsageError(f"{what} images: {len(cloud)}; expected more than the {neighbours} neighbours")
    a, b = (torch.from_numpy(np.asarray(cloud, dtype=np.float64)) for cloud in (real, generated))
    return _covered(b, by=a, neighbours=neighbours), _covered(a, by=b, neighbours=neighbours)


def _covered(points: torch.Tensor, *, by: torch.Tensor, neighbours: int) -> float:
    """Return the share of `points` [M, E] that lie in the manifold of `by` [N, E]."""
    size = max(1, _BLOCK_BYTES // (8 * len(by)))
    # The nearest to a point of its own cloud is itself.
    radii = torch.cat([_distances(part, by).kthvalue(neighbours + 1, dim=1).values for part in by.split(size)])
    inside = [(_distances(part, by) <= radii).any(1) for part in points.split(size)]
    return torch.cat(inside).double().mean().item()


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Not by matrix products: near a radius their cancellation would decide on which side a point lies.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
