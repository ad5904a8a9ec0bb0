"""Newton's method with backtracking for many small convex problems at once, free or on a sphere.

Source: Boyd and Vandenberghe, "Convex Optimization", section 9.5; on the sphere, with the projected Hessian
and normalisation as the retraction: Absil, Mahony and Sepulchre, "Optimization Algorithms on Matrix
Manifolds", sections 4.1 and 6.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

Objective = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of vectors (C, D): the values (C,), gradients (C, D) and Hessians (C, D, D)."""

_MOST_STEPS, _MOST_HALVINGS = 30, 12
_TOLERANCE = 1e-4


def minimise(objective: Objective, start: Tensor, *, on_sphere: bool) -> Tensor:
    """The minimum of each problem.

    Args:
        objective: convex in each vector.
        start: (C, D); on a sphere, vectors of its radius.
        on_sphere: keep each vector's norm as it is at the start.

    Returns:
        (C, D).
    """
    vectors = start
    value, gradient, hessian = objective(vectors)
    for _ in range(_MOST_STEPS):
        if on_sphere:
            gradient, hessian = _along_sphere(vectors, gradient, hessian)
        step = torch.linalg.solve(hessian, gradient)
        slope = (step * gradient).sum(1)
        size = torch.ones_like(value)
        for _ in range(_MOST_HALVINGS):
            moved = vectors - size[:, None] * step
            if on_sphere:
                moved = normalize(moved, dim=1) * vectors.norm(dim=1, keepdim=True)
            moved_value, gradient, hessian = objective(moved)
            # Below rounding a step that changes nothing is as good as any.
            too_far = moved_value > value - 0.25 * size * slope + 1e-6 * value.abs()
            if not too_far.any():
                break
            size = torch.where(too_far, size / 2, size)
        vectors, value = moved, moved_value
        if float((step.norm(dim=1) / (1 + vectors.norm(dim=1))).max()) < _TOLERANCE:
            break
    return vectors


def _along_sphere(vectors: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and a positive definite Hessian of the problem on the sphere through each vector."""
    squares = vectors.square().sum(1)[:, None]  # [C, 1]
    outward = (gradient * vectors).sum(1)[:, None] / squares
    tangent = gradient - outward * vectors
    normal = vectors[:, :, None] * vectors[:, None, :] / squares[:, :, None]
    projection = torch.eye(vectors.shape[1], device=vectors.device) - normal
    # The sphere's own curvature is -outward; where it bends the wrong way, the convex part will do.
    curvature = (-outward).clamp(min=0)[:, :, None] * projection
    return tangent, projection @ hessian @ projection + curvature + normal
