"""A few views made again: what no hash of settings sees.

Another decoder, another resize kernel, or an image that was replaced by one of equal size change
what a teacher would say, and nothing that is written in a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import Tensor

from distill.cache import codec, layout, read
from distill.cache.layout import Manifest
from distill.cache.store import Store
from distill.data import views
from distill.data.datasets import Dataset
from distill.data.pixels import Views
from distill.engine import machine
from distill.errors import IdentityError, IncompatibleError
from distill.models.network import Network
from distill.recipe import Recipe
from distill.types import Outputs

NUM_CANARIES = 32
KL_SAME = 1e-3  # nats, mean: what other kernels for the same arithmetic stay below
KL_NEAR = 2e-2  # what another pixel path stays below; a box moved by a pixel costs 3e-2
_CANARIES = int.from_bytes(b"canaries", "big")  # stream of random numbers


def canaries_file(
    recipe: Recipe, dataset: Dataset, network: Network, *, num_views: int, device: torch.device
) -> bytes:
    """Some views by the checksum of their pixels, and what the teacher says of them."""
    positions, numbers = _canaries(dataset, recipe.data.seed, num_views)
    return save_tensors(
        {
            "positions": positions,
            "views": numbers,
            "pixels": _checksums(recipe, dataset, positions, numbers, device),
            "logits": answers(recipe, dataset, network, positions, numbers, device),
        }
    )


def require_exact(kept: str, canaries: bytes, origin: str) -> None:
    """Refuse a codec that would change these answers by more than other kernels do.

    A byte a class is a part of the row's range: one class that is all but impossible (a logit
    hundreds below the others) leaves too little of it for the rest.

    Raises:
        IncompatibleError: If it would.
        DivergedError: If an answer is not finite.
    """
    logits = torch.from_numpy(load_tensors(canaries)["logits"])
    columns = codec.encode(kept, logits)
    codec.require_finite(columns, origin)
    if kept.startswith("topk:"):  # cuts by intention
        return
    kl = divergence(logits.numpy(), codec.decode(kept, columns, logits.shape[1]).numpy())
    if kl > KL_SAME:
        raise IncompatibleError(
            f"{origin}: cache.codec {kept} would change this teacher's answers by KL {kl:.2g} nats "
            f"(on {len(logits)} views): its logits span too wide a range",
            hint="--codec fp16",
        )


def check_canaries(
    store: Store,
    manifest: Manifest,
    recipe: Recipe,
    dataset: Dataset,
    network: Network | None,
    device: torch.device,
) -> list[str]:
    """Make the cache's canaries again, and compare; return what should be known of it.

    Raises:
        IdentityError: If the teacher would say something else today.
        DamagedError: If they are not those that were written.
    """
    kept = read.canaries(store, manifest)
    ids, train = read.samples(store)["train"], dataset.train_ids
    # A smaller training set can be served too, where no view mixes two samples.
    there = np.isin(ids[kept["positions"]], train)
    positions = np.searchsorted(train, ids[kept["positions"][there]])
    numbers = kept["views"][there]
    if not len(positions):
        return []
    found = _checksums(recipe, dataset, positions, numbers, device)
    altered = int((found != kept["pixels"][there]).sum())
    pixels = f"{store.origin}: {altered} of {len(positions)} views made again have other pixels"
    if network is None:
        if altered:
            raise IdentityError(
                f"{pixels} than the teacher saw",
                hint="the image files, Pillow or the views of this version differ from those then",
            )
        return []
    told = answers(recipe, dataset, network, positions, numbers, device)
    kl = divergence(kept["logits"][there], told)
    if kl > KL_NEAR:
        raise IdentityError(
            f"{store.origin}: the teacher would say something else today: KL {kl:.2g} nats on "
            f"{len(positions)} views made again, {altered} of which have other pixels",
            hint="make the cache again in another folder; `--verify teacher` shows more",
        )
    if altered or kl > KL_SAME:
        return [
            f"{pixels}, and the teacher's answers differ by KL {kl:.2g} nats: no more than "
            "another decoder costs"
        ]
    return []


def divergence(kept: Float[ndarray, "n K"], now: Float[ndarray, "n K"]) -> float:
    """Mean KL(kept ‖ now) of two sets of logits at T = 1, in nats."""
    return float(divergences(kept, now).mean())


def divergences(kept: Float[ndarray, "n K"], now: Float[ndarray, "n K"]) -> Float[ndarray, " n"]:
    """KL(kept ‖ now) of each row of logits at T = 1, in nats."""
    log_p, log_q = (torch.from_numpy(z).double().log_softmax(dim=-1) for z in (kept, now))
    kl: ndarray = (log_p.exp() * (log_p - log_q)).sum(dim=-1).numpy()
    return kl


def precision(recipe: Recipe) -> str:
    """The numbers in which the teachers compute."""
    own = None if recipe.cache is None else recipe.cache.precision
    return own or recipe.train.precision


@contextmanager
def numerics(kind: str, device: torch.device) -> Iterator[None]:
    """The arithmetic of a teacher whose answers are kept: fp32 is fp32 on every device."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    if kind == "fp32":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # fp32 inside a training step of another precision has to say so.
    exact = torch.autocast(device.type, enabled=False)
    try:
        with torch.no_grad(), exact if kind == "fp32" else machine.autocast(kind, device):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tell(network: Network, images: Tensor, recipe: Recipe, device: torch.device) -> Outputs:
    """What the teacher says of these images, in the arithmetic that a cache names."""
    with numerics(precision(recipe), device):
        outputs: Outputs = network(images)
    return outputs


def _canaries(
    dataset: Dataset, seed: int, num_views: int
) -> tuple[Int[ndarray, " c"], Int[ndarray, " c"]]:
    """Positions and views of the canaries, spread over both; in a small set they may be fewer."""
    n = len(dataset.train_ids)
    numbers = np.arange(NUM_CANARIES) * num_views // NUM_CANARIES
    draws = views.uniform(seed, np.arange(NUM_CANARIES), 0, stream=_CANARIES, num=1)[:, 0]
    both = np.unique((draws * n).astype(np.int64) * num_views + numbers)
    return both // num_views, both % num_views


def _checksums(
    recipe: Recipe,
    dataset: Dataset,
    positions: Int[ndarray, " c"],
    numbers: Int[ndarray, " c"],
    device: torch.device,
) -> ndarray:
    """CRC-32 of the pixels that the teacher is shown, before they are mixed with others'."""
    plain = recipe.data.model_copy(update={"mixup": 0.0, "cutmix": 0.0})
    few = replace(dataset, train_ids=dataset.train_ids[positions])
    at = np.arange(len(positions))
    found = []
    for batch in Views(few, plain, device=device, audience="teacher").batches(
        at, numbers, batch_size=1
    ):
        pixels = (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        found.append(layout.checksum(pixels.contiguous().cpu().numpy().tobytes()))
    return np.array(found, np.uint32)


def answers(
    recipe: Recipe,
    dataset: Dataset,
    network: Network,
    positions: Int[ndarray, " c"],
    numbers: Int[ndarray, " c"],
    device: torch.device,
) -> Float[ndarray, "c K"]:
    """The teacher's logits of the views `numbers` of the samples at `positions`."""
    source = Views(dataset, recipe.data, device=device, audience="teacher")
    found = np.empty((len(positions), len(dataset.classes)), np.float32)
    network = network.to(device)
    for batch, which in source.single(positions, numbers, batch_size=64):
        told = tell(network, batch.images, recipe, device).logits.float().cpu().numpy()
        found[which] = told
    source.close()
    return found
