"""A probe finds what is in the features and nothing else, on images that it was not fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.linear_model
import torch
from torch import Tensor, nn

from distill.data import datasets
from distill.data.masks import automatic
from distill.diagnostics import UndefinedError, dense
from distill.diagnostics.dense import Dense, logistic, mean_iou, probe
from distill.models.network import Network
from distill.recipe import Data
from tests.diagnostics.test_equivariance import VIT, student
from tests.models import made


def blobs(count: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Images of noise with a disc that no single colour tells, and the discs."""
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    places = torch.rand(count, 2, generator=draw) * size
    gaps = (rows - places[:, :1, None]) ** 2 + (columns - places[:, 1:, None]) ** 2
    masks = gaps < (size / 3) ** 2
    images = torch.rand(count, 3, size, size, generator=draw) * 0.5
    return images + 0.4 * masks[:, None], masks


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_that_of_scikit_learn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(200, 5))
    y = 1 / (1 + np.exp(-2 * (x @ draw.normal(size=5) + draw.normal(size=200)) + 0.6))
    y = np.round(y) if seed % 2 else y  # classes, or shares
    ridge = 10.0 ** -(seed % 4 + 1)
    model = sklearn.linear_model.LogisticRegression(
        C=1 / (200 * ridge), tol=1e-12, solver="newton-cholesky"
    )
    # A share is a row of each class, with the share as its weight.
    model.fit(np.tile(x, (2, 1)), np.repeat([1, 0], 200), np.concatenate([y, 1 - y]))
    found = logistic(torch.tensor(x), torch.tensor(y), ridge=ridge)
    np.testing.assert_allclose(found[:-1], model.coef_[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[-1], model.intercept_[0], rtol=0, atol=1e-6)


def test_the_fit_has_no_slope_left_wherever_it_began() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=draw, dtype=torch.float64)
    y = torch.rand(300, generator=draw, dtype=torch.float64)  # shares, not classes
    found = logistic(x, y, ridge=0.01)
    far = logistic(x, y, ridge=0.01, start=torch.full((5,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(found, far, atol=1e-7, rtol=0)
    w = found.clone().requires_grad_()
    z = x @ w[:-1] + w[-1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y) + 0.005 * (w[:-1] ** 2).sum()
    (slope,) = torch.autograd.grad(loss, w)
    assert slope.abs().max() < 1e-7


def test_separable_rows_have_a_fit() -> None:
    x = torch.tensor([[-1.0], [1.0]]).repeat(50, 1)
    found = logistic(x, (x[:, 0] > 0).double(), ridge=1e-4)
    assert bool(found.isfinite().all())
    assert bool(((x[:, 0] * found[0] + found[1] > 0) == (x[:, 0] > 0)).all())


def plain_iou(said: Tensor, known: Tensor) -> float:
    parts = []
    for s, k in ((said, known), (~said, ~known)):
        union = (s | k).sum()
        parts.append(int((s & k).sum()) / int(union) if union else 1.0)
    return sum(parts) / 2


def test_the_mean_iou_follows_from_the_right_parts() -> None:
    draw = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        for other in (0.0, 0.3, 1.0):
            said = torch.rand(1, 9, 7, generator=draw) < share
            known = torch.rand(1, 9, 7, generator=draw) < other
            found = mean_iou(dense._right(said, known))
            assert float(found[0]) == pytest.approx(plain_iou(said, known), abs=1e-12)


def accuracy(right: Tensor) -> float:
    return float(right.sum(dim=1).mean())


def of_all(right: Tensor) -> float:
    return float(mean_iou(right.mean(dim=0)))


def test_features_that_hold_the_mask_are_read_to_the_cell() -> None:
    images, masks = blobs(60)
    coarse = masks[:, 2::4, 2::4].repeat_interleave(4, 1).repeat_interleave(4, 2)  # whole cells
    shown = 0.2 * images
    shown[:, 1] = 0.5 * coarse + 0.2
    found = probe(student(**VIT), shown, coarse)
    assert found.site.grid == (4, 4)
    right = found.said[:, 2::4, 2::4] == coarse[found.held][:, 2::4, 2::4]
    assert right.double().mean() > 0.97
    assert of_all(found.features) > 0.8  # between the centres of cells the logits run on linearly


class OfEachPixel(nn.Module):
    """A grid that is a turned image, cell by pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Conv2d(3, 6, 1)
        self.fc = nn.Linear(6, made.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.turned(x).mean(dim=(2, 3)))
        return logits


def of_each_pixel() -> Network:
    torch.manual_seed(0)
    return made.wrapped(OfEachPixel(), "turned", (16, 16)).eval()


def test_a_mask_that_is_linear_in_the_features_is_found_to_the_pixel() -> None:
    images, masks = blobs(40)
    shown = images.clone()
    shown[:, 1] = 0.5 * masks + images[:, 0] - images[:, 2] / 2 + 0.25
    found = probe(of_each_pixel(), shown, masks)
    assert found.site.grid == (16, 16)
    assert torch.equal(found.said, masks[found.held])
    assert of_all(found.features) == 1
    assert of_all(found.pixels) == 1  # here they are the same


def test_features_that_know_nothing_are_worth_what_is_right_anyway() -> None:
    _, masks = blobs(60)
    noise = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    for network in (student(model="resnet8"), of_each_pixel()):
        found = probe(network, noise, masks)
        trivial = max(of_all(found.background), of_all(found.foreground))
        assert of_all(found.features) == pytest.approx(trivial, abs=0.04)
        assert of_all(found.pixels) == pytest.approx(trivial, abs=0.04)


def test_the_order_of_the_images_does_not_matter() -> None:
    images, masks = blobs(24)
    network = student(**VIT)
    one = probe(network, images, masks)
    fitted = torch.tensor([i for i in range(24) if i not in one.held])
    order = torch.arange(24)
    order[one.held] = one.held.flip(0)
    order[fitted[:9]] = fitted[:9].flip(0)  # three quarters; the last choose the ridge
    two = probe(network, images[order], masks[order])
    assert torch.equal(two.said, one.said.flip(0))
    assert of_all(two.features) == pytest.approx(of_all(one.features), abs=1e-12)


def test_no_more_cells_are_kept_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "CELLS", 10)
    seen = []
    layer = dense._layer
    monkeypatch.setattr(
        dense, "_layer", lambda *cells: seen.append(cells[1].shape) or layer(*cells)
    )
    for count in (6, 40):
        images, masks = blobs(count)
        assert len(probe(student(model="resnet8"), images, masks, batch_size=4).held) == count // 2
    assert seen == [(3, 3), (3, 3), (10, 1), (10, 1)]


def test_it_is_deterministic_and_holds_images_out() -> None:
    images, masks = blobs(30)
    network = student(**VIT)
    one, two = probe(network, images, masks), probe(network, images, masks, batch_size=7)
    assert isinstance(one, Dense)
    torch.testing.assert_close(one.features, two.features, atol=1e-3, rtol=0)
    assert torch.equal(one.held, two.held)
    assert len(one.held) == 15
    assert torch.equal(one.held, one.held.sort().values)
    # What it says of held images does not depend on their masks.
    changed = masks.clone()
    changed[one.held] = ~changed[one.held]
    assert torch.equal(probe(network, images, changed).said, one.said)


def test_the_baselines_are_what_is_right_anyway() -> None:
    images, masks = blobs(20)
    found = probe(student(**VIT), images, masks)
    share = masks[found.held].double().mean()
    assert accuracy(found.foreground) == pytest.approx(float(share))
    assert accuracy(found.background) == pytest.approx(float(1 - share))
    assert of_all(found.foreground) == pytest.approx(float(share) / 2)
    assert accuracy(found.features) > max(float(share), float(1 - share))


def test_foreground_of_real_digits_is_found() -> None:
    dataset = datasets.load(Data(name="digits"))
    pixels = torch.from_numpy(dataset.test.pixels[:80]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # type: ignore[index]
    images = pixels / 255
    masks = automatic(images)
    assert masks is not None
    found = probe(student(model="resnet8"), images, masks, site="layer1")
    assert found.site.grid == (8, 8)
    assert of_all(found.features) > 0.75 > of_all(found.background) + 0.3


def test_the_network_is_as_it_was() -> None:
    images, masks = blobs(12)
    network = student(**VIT).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    probe(network, images, masks)
    assert network.training
    assert network(images).features is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_site_by_name_and_one_that_is_not_there() -> None:
    images, masks = blobs(12)
    network = student(model="resnet8")
    assert probe(network, images, masks, site="layer1").site.name == "layer1"
    with pytest.raises(UndefinedError, match=r"no grid 'layer9'.*layer"):
        probe(network, images, masks, site="layer9")


def test_what_has_no_answer() -> None:
    images, masks = blobs(12)
    with pytest.raises(UndefinedError, match="no grid of more than one cell"):
        probe(student(model="mlp"), images, masks)
    with pytest.raises(UndefinedError, match="fewer than 4 images"):
        probe(student(**VIT), images[:3], masks[:3])
    held = probe(student(**VIT), images, masks).held
    alone = torch.zeros_like(masks)
    alone[held] = masks[held]
    for same in (torch.ones_like(masks), torch.zeros_like(masks), alone, masks & ~alone):
        with pytest.raises(UndefinedError, match="all foreground or all background"):
            probe(student(**VIT), images, same)
    broken = of_each_pixel()
    with torch.no_grad():
        broken.get_parameter("backbone.turned.bias")[0] = torch.inf
    with pytest.raises(UndefinedError, match="not finite"):
        probe(broken, images, masks)
