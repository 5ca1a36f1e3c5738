"""How the loss bends around a network's weights: its Hessian, and what steps away from them cost.

Ghorbani, Krishnan, Xiao: An Investigation into Neural Net Optimization via Hessian Eigenvalue
Density, 2019, arXiv:1901.10159; of what loss: Park, Kim: How Do Vision Transformers Work?, 2022,
arXiv:2202.06709; its worst step: Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization
for Efficiently Improving Generalization, 2021, arXiv:2010.01412.

The loss is L(w) = mean NLL + decay / 2 · ‖w‖², where w are all parameters of the network in eval
mode. Park and Kim ask about the loss that was trained on: with the decay, and on augmented training
images; without either, one is misled. A decoupled decay, AdamW's, is no part of a loss: give 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.diagnostics import UndefinedError
from distill.diagnostics.tapped import forgetful, shared

STEPS = 20  # of Lanczos
PROBES = 10  # of the trace; 50 for a number to publish
DRAWS = 10  # of noise

Labels = Float[Tensor, "N K"] | Int[Tensor, " N"]


class Curvature(NamedTuple):
    """The eigenvalues of the Hessian, as far as Lanczos finds them."""

    largest: float
    smallest: float
    negative: float  # Σ |λ| of those below 0, over Σ |λ|
    values: Float[Tensor, " steps"]  # Ritz values, rising
    shares: Float[Tensor, " steps"]  # of all eigenvalues, that each stands for; their sum is 1


def curvature(
    network: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    labels: Labels,
    *,
    weight_decay: float = 0.0,
    steps: int = STEPS,
    seed: int = 0,
    batch_size: int = 64,
) -> Curvature:
    """The extreme eigenvalues of the Hessian of the loss, and their density.

    Lanczos from one Gaussian vector, every vector made orthogonal to all before it. Ritz values lie
    within the spectrum and reach its ends first: after 20 steps the largest of a trained network is
    exact and the smallest within a few per cent. `negative` is the quadrature of |λ| by Ritz values
    and shares, of those below 0 over all; it compares at the same number of steps. How many
    eigenvalues are below 0 would be up to rounding: most of a large network's are about 0.

    The Hessian is that of the smooth pieces of the loss: where ReLUs bend, it knows nothing of the
    bends, `perturbation` does. A step costs about as much as 10 forward passes of all images, and
    as many vectors of all weights are held as there are steps.

    Args:
        network: In eval mode; gives `Outputs`.
        images: In [0, 1], on its device and of its precision; augmented as in training.
        labels: Classes, or their probabilities.
        weight_decay: As in a recipe's optimizer, where its decay is part of the loss.
        steps: Of Lanczos, at least 1; no more are taken than there are weights.
        seed: Decides the first vector.
        batch_size: Images at once; another size changes nothing but the rounding.

    Raises:
        UndefinedError: If an operation of the network has no second derivative, or a number of it
            is not finite.
    """
    loss = _loss(network, images, labels, weight_decay, batch_size)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(loss.weights), generator=generator).to(loss.weights)
    basis = [drawn / drawn.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        found = _product(loss, basis[-1])
        diagonal.append(_dot(found, basis[-1]))
        rounding = 10 * torch.finfo(found.dtype).eps * found.norm()
        for vector in basis * 2:  # once leaves rounding that grows from step to step
            found = found - torch.dot(vector, found) * vector
        length = found.norm()
        if len(basis) == min(steps, len(found)) or not bool(length > rounding):
            break
        beside.append(length.double())
        basis.append(found / length)
    alpha = torch.stack(diagonal)
    beta = torch.stack(beside) if beside else alpha[:0]
    _require_finite(torch.cat([alpha, beta]))
    tridiagonal = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
    values, vectors = torch.linalg.eigh(tridiagonal.cpu())
    shares = vectors[0].square()
    below, all_of_them = ((shares * x).sum() for x in ((-values).clamp_min(0), values.abs()))
    return Curvature(
        largest=float(values[-1]),
        smallest=float(values[0]),
        negative=float(below / all_of_them) if all_of_them > 0 else 0.0,
        values=values,
        shares=shares,
    )


def trace(
    network: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    labels: Labels,
    *,
    weight_decay: float = 0.0,
    probes: int = PROBES,
    seed: int = 0,
    batch_size: int = 64,
) -> Float[Tensor, " probes"]:
    """Hutchinson's estimates of the trace of the Hessian H of the loss: vᵀHv, each v of ±1.

    The trace is their mean in expectation. A probe costs about as much as 10 forward passes of all
    images. Arguments and errors are those of `curvature`, apart from these:

    Args:
        network: In eval mode; gives `Outputs`.
        images: In [0, 1].
        labels: Classes, or their probabilities.
        weight_decay: That is part of the loss; it adds as much times the number of weights.
        probes: How many; 10 tell networks apart, the standard error says how well.
        seed: Decides them.
        batch_size: Images at once.

    Returns:
        One value a probe, in float64.
    """
    loss = _loss(network, images, labels, weight_decay, batch_size)
    draws = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(probes):
        signs = torch.empty(len(loss.weights)).bernoulli_(generator=draws) * 2 - 1
        probe = signs.to(loss.weights)
        found.append(_dot(probe, _product(loss, probe)))
    return _require_finite(torch.stack(found)).cpu()


def perturbation(
    network: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    labels: Labels,
    *,
    weight_decay: float = 0.0,
    scale: float = 0.02,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 64,
) -> Float[Tensor, " draws"]:
    """What noise costs that is relative to each weight: L(w + σ |w| ⊙ ξ) − L(w), ξ Gaussian.

    As the noise is in proportion, layers that are scaled against each other so that all answers
    stay cost the same; eigenvalues of the Hessian change. It costs `draws` + 1 forward passes an
    image.

    Args:
        network: In eval mode; gives `Outputs`.
        images: In [0, 1]; augmented as in training.
        labels: Classes, or their probabilities.
        weight_decay: That is part of the loss.
        scale: σ; 0.02 raises the loss of a trained network by a few per cent.
        draws: How many ξ.
        seed: Decides them.
        batch_size: Images at once; another size changes nothing but the rounding.

    Returns:
        One value a draw, in nats, in float64.

    Raises:
        UndefinedError: If a loss is not finite.
    """
    loss = _loss(network, images, labels, weight_decay, batch_size)
    noise = torch.Generator().manual_seed(seed)
    here = _value(loss, loss.weights)
    found = []
    for _ in range(draws):
        drawn = torch.randn(len(loss.weights), generator=noise).to(loss.weights)
        found.append(_value(loss, loss.weights + scale * loss.weights.abs() * drawn) - here)
    return _require_finite(torch.stack(found)).cpu()


def sam(
    network: nn.Module,
    images: Float[Tensor, "N 3 H W"],
    labels: Labels,
    *,
    weight_decay: float = 0.0,
    radius: float = 0.05,
    batch_size: int = 64,
) -> float:
    """What the step costs that is the worst to first order: L(w + ρ g / ‖g‖) − L(w), g = ∇L(w).

    It costs about 5 forward passes an image.

    Args:
        network: In eval mode; gives `Outputs`.
        images: In [0, 1]; augmented as in training.
        labels: Classes, or their probabilities.
        weight_decay: That is part of the loss.
        radius: ρ, 0.05 in the paper.
        batch_size: Images at once; another size changes nothing but the rounding.

    Returns:
        In nats. 0 where the gradient is 0.

    Raises:
        UndefinedError: If a loss is not finite.
    """
    loss = _loss(network, images, labels, weight_decay, batch_size)
    slope = loss.decay * loss.weights
    for part in loss.parts:
        with _differentiable(slope):
            weights = loss.weights.detach().requires_grad_()
            slope += torch.autograd.grad(part(weights), weights)[0]
    steepness = slope.norm().clamp_min(torch.finfo(slope.dtype).tiny)
    there = _value(loss, loss.weights + radius * (slope / steepness))
    return float(_require_finite(there - _value(loss, loss.weights)))


class _Loss(NamedTuple):
    """A function of all weights in one vector: its parts' sum, and the decay."""

    weights: Float[Tensor, " P"]  # where the network is
    parts: list[Callable[[Tensor], Tensor]]  # a batch each
    decay: float


def _loss(
    network: nn.Module, images: Tensor, labels: Tensor, decay: float, batch_size: int
) -> _Loss:
    own = shared(network)
    shapes = {name: parameter.shape for name, parameter in own.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    weights = torch.cat([parameter.detach().flatten() for parameter in own.parameters()])

    def part(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        pieces = zip(shapes.items(), torch.split(weights, sizes), strict=True)
        moved = {name: piece.view(shape) for (name, shape), piece in pieces}
        share = len(x) / len(images)
        if len(x) == 1:  # PyTorch's gradients of batch normalisation may be wrong for one image
            x, y = torch.cat([x, x]), torch.cat([y, y])
        logits = functional_call(forgetful(own), moved, (x,)).logits
        return F.cross_entropy(logits.double(), y) * share

    told = labels.double() if labels.is_floating_point() else labels
    batches = zip(torch.split(images, batch_size), torch.split(told, batch_size), strict=True)
    return _Loss(weights, [partial(part, x, y) for x, y in batches], decay)


def _value(loss: _Loss, weights: Tensor) -> Float[Tensor, ""]:
    """L(w), in float64: differences of it are small."""
    with torch.no_grad(), torch.autocast(weights.device.type, enabled=False):
        nll = torch.stack([part(weights) for part in loss.parts]).sum()
        return nll + loss.decay / 2 * _dot(weights, weights)


def _product(loss: _Loss, vector: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """The Hessian times a vector: the gradient of the gradient's product with it."""
    total = loss.decay * vector
    for part in loss.parts:
        with _differentiable(vector):
            weights = loss.weights.detach().requires_grad_()
            slope = torch.autograd.grad(part(weights), weights, create_graph=True)[0]
            if not slope.requires_grad:  # the loss is linear
                continue
            try:
                total += torch.autograd.grad(slope, weights, vector)[0]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UndefinedError("an operation of it has no second derivative") from error
    return total


@contextmanager
def _differentiable(vector: Tensor) -> Iterator[None]:
    """Gradients in full precision; fused attention's have none of their own."""
    exact = torch.autocast(vector.device.type, enabled=False)
    with torch.enable_grad(), exact, sdpa_kernel(SDPBackend.MATH):
        yield


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    return torch.dot(a.double(), b.double())


def _require_finite(found: Tensor) -> Tensor:
    if not bool(found.isfinite().all()):
        raise UndefinedError("its loss, or a slope of it, is not a finite number")
    return found
