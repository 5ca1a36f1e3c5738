"""What comes back is what the teacher said, to the last step that the code has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy import ndarray
from torch import Tensor

from distill.cache import codec, layout
from distill.errors import DivergedError
from tests.cache.made import TYPES

CODECS = ("int8", "fp16", "topk:3", "topk:100")
HAIR = 2e-6  # a few roundings of float32, relative


def through(kept: str, logits: Tensor) -> Tensor:
    """The logits after they were kept in files, where columns are numpy's."""
    columns = codec.encode(kept, logits)
    files = {
        name: np.frombuffer(c.numpy().tobytes(), c.numpy().dtype) for name, c in columns.items()
    }
    again = {
        name: torch.from_numpy(file.copy()).reshape(columns[name].shape)
        for name, file in files.items()
    }
    return codec.decode(kept, again, logits.shape[1])


def kl(p: Tensor, q: Tensor, *, temperature: float = 1.0) -> ndarray:
    """KL(p ‖ q) of each row, Σ p (log p − log q), in float64 and nats."""
    z, y = (logits.numpy().astype(np.float64) / temperature for logits in (p, q))
    log_p, log_q = (a - np.logaddexp.reduce(a, axis=1, keepdims=True) for a in (z, y))
    divergence: ndarray = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return divergence


def realistic(sharpness: float = 1.0, rows: int = 300, num_classes: int = 1000) -> Tensor:
    """Logits as those of a teacher of 1,000 classes: one class stands out, and some are like it."""
    draw = np.random.default_rng(0)
    tail = draw.standard_normal((rows, num_classes)) * 1.3
    like_it = draw.gamma(1.0, 1.0, (rows, num_classes)) * (draw.random((rows, num_classes)) < 0.02)
    first = np.eye(num_classes)[draw.integers(num_classes, size=rows)]
    logits = (
        tail + like_it * 2 + first * draw.uniform(2, 11, (rows, 1)) + draw.normal(0, 1, (rows, 1))
    )
    return torch.from_numpy(logits * sharpness).float()


@pytest.mark.parametrize("kept", CODECS)
@pytest.mark.parametrize("num_classes", [2, 10, 1000, 70_000])
def test_columns_are_those_that_the_layout_says(kept: str, num_classes: int) -> None:
    columns = codec.encode(kept, torch.randn(4, num_classes))
    expected = layout.columns(kept, num_classes)
    assert columns.keys() == {column.name for column in expected}
    for column in expected:
        found = columns[column.name].numpy()
        assert found.dtype == TYPES[column.dtype]
        assert found.shape == (4, *column.shape)


@pytest.mark.parametrize("kept", CODECS)
@pytest.mark.parametrize("given_as", [torch.float64, torch.bfloat16, torch.float16])
def test_any_precision_is_taken_as_float32(kept: str, given_as: torch.dtype) -> None:
    logits = realistic(rows=5).to(given_as)
    for name, column in codec.encode(kept, logits).items():
        assert torch.equal(column, codec.encode(kept, logits.float())[name])
    assert through(kept, logits).dtype == torch.float32


rows_of_logits = st.one_of(
    # Any numbers, those of one row near each other or not.
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(2, 12)),
        elements=st.floats(-60_000, 60_000, width=32),
    ),
    # A range about an offset: 1e-7 to 1e4 about 0 to 5e4.
    st.builds(
        lambda seed, shape, spread, offset: (
            np.random.default_rng(seed).uniform(-1, 1, shape) * spread + offset
        ).astype(np.float32),
        st.integers(0, 2**32),
        st.tuples(st.integers(1, 4), st.sampled_from([2, 3, 10, 1000])),
        st.sampled_from([0.0, 1e-7, 1e-6, 3e-5, 1e-3, 0.1, 1.0, 30.0, 1e4]),
        st.sampled_from([0.0, 1e-3, -1.0, 10.0, -10.0, 999.9, -1000.3, 5e4, -5e4]),
    ),
)


@given(rows_of_logits)
@example(np.array([[1000.2, 1000.1, 999.2]], np.float32))  # float16's step here is a half
@example(np.array([[1e4, -1e4]], np.float32))
@example(np.array([[1e4, 9999.0, 9998.0, 9997.0]], np.float32))
@example(np.array([[0.0, 0.0, 0.0]], np.float32))
@example(np.array([[0.1, 0.1]], np.float32))
@example(np.array([[65_504.0, 65_503.0]], np.float32))
@example(np.array([[0.0, -1e-5]], np.float32))
@example(np.array([[-1e-9, -2e-9]], np.float32))
@example(np.array([[0.0, -1e6, -3e6]], np.float32))
@settings(deadline=None, max_examples=300)
def test_int8_is_right_to_half_a_step_of_the_rows_own_range(logits: ndarray) -> None:
    z = torch.from_numpy(logits)
    columns = codec.encode("int8", z)
    step = columns["scale"].double()
    error = (through("int8", z).double() - z.double()).abs().amax(dim=1)
    greatest = z.double().abs().amax(dim=1)
    assert (error <= step / 2 + HAIR * greatest + 1e-37).all()
    # The step is a 255th of the range, but for what float16 does not tell apart at the top.
    span = z.double().amax(dim=1) - z.double().amin(dim=1)
    blur = z.double().amax(dim=1).abs() * 2**-10 + 2**-24
    assert (step <= (span + blur) / 255 * (1 + 2**-10) + 2**-24).all()


@given(rows_of_logits)
@settings(deadline=None, max_examples=200)
def test_int8_keeps_the_order(logits: ndarray) -> None:
    """Two classes can become equal, where they are within a step, but never change places."""
    z = torch.from_numpy(logits)
    columns, again = codec.encode("int8", z), through("int8", z)
    order = z.argsort(dim=1)
    assert (again.gather(1, order).diff(dim=1) >= 0).all()
    first = again.argmax(dim=1, keepdim=True)
    behind = (z.amax(dim=1, keepdim=True) - z.gather(1, first)).double()
    step = columns["scale"][:, None].double()
    assert (behind <= step + HAIR * z.double().abs().amax(dim=1, keepdim=True) + 1e-37).all()


@given(rows_of_logits)
@settings(deadline=None, max_examples=200)
def test_fp16_is_right_to_float16s_own_step(logits: ndarray) -> None:
    z = torch.from_numpy(logits)
    log_p = z.double().log_softmax(dim=1)
    error = (through("fp16", z).double().log_softmax(dim=1) - log_p).abs()
    allowed = 2**-10 * log_p.abs() + 2**-24 + HAIR * z.double().abs().amax(dim=1, keepdim=True)
    assert (error <= allowed)[log_p > -65_504].all()
    assert (kl(z, through("fp16", z)) < 1e-5 + HAIR * np.abs(logits).max()).all()


@pytest.mark.parametrize("temperature", [1, 2, 4, 8])
@pytest.mark.parametrize("sharpness", [1.0, 2.2], ids=["soft", "sharp"])
@pytest.mark.parametrize(("kept", "most"), [("int8", 1e-4), ("fp16", 1e-6)])
def test_a_teacher_is_the_same_at_every_temperature(
    kept: str, most: float, sharpness: float, temperature: float
) -> None:
    z = realistic(sharpness)
    divergence = kl(z, through(kept, z), temperature=temperature)
    assert divergence.mean() < most
    assert divergence.max() < 5 * most


@pytest.mark.parametrize("kept", ["int8", "fp16"])
def test_the_first_class_stays_the_first(kept: str) -> None:
    z = realistic()
    again = through(kept, z)
    first, found = z.argmax(dim=1), again.argmax(dim=1)
    differ = (first != found).nonzero()[:, 0]
    assert len(differ) < 10  # of 300, where two classes are equal to a step
    step = 0.06 if kept == "int8" else 0.01
    assert (z[differ, first[differ]] - z[differ, found[differ]] < step).all()
    assert (again.gather(1, first[:, None])[:, 0] == again.amax(dim=1)).all()


@pytest.mark.parametrize("kept", ["int8", "fp16", "topk:1000"])
def test_logits_come_back_and_not_only_their_differences(kept: str) -> None:
    """Losses on logits themselves need what softmax takes away."""
    z = realistic()
    assert (through(kept, z) - z).abs().max() < 0.05
    assert (through(kept, z + 10) - through(kept, z) - 10).abs().max() < 0.1


@pytest.mark.parametrize("num_kept", [1, 5, 100, 999])
@pytest.mark.parametrize("sharpness", [1.0, 2.2], ids=["soft", "sharp"])
def test_topk_keeps_the_greatest_and_spreads_the_rest_evenly(
    num_kept: int, sharpness: float
) -> None:
    z = realistic(sharpness)
    log_p = z.double().log_softmax(dim=1)
    again = (through(f"topk:{num_kept}", z) - z.logsumexp(dim=1, keepdim=True)).double()
    assert (again.exp().sum(dim=1) - 1).abs().max() < 1e-3
    best, ids = log_p.topk(num_kept, dim=1)
    assert ((again.gather(1, ids) - best).abs() <= 2**-10 * best.abs() + 1e-5).all()
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, ids, value=False)
    tail = again[others].reshape(len(z), -1)
    assert (tail == tail[:, :1]).all()
    mass = log_p[others].exp().reshape(len(z), -1).sum(dim=1)
    assert (tail.exp().sum(dim=1) - mass).abs().max() < 1e-3
    assert torch.equal(again.argmax(dim=1), z.argmax(dim=1))


def test_topk_of_as_many_as_there_are_is_dense() -> None:
    z = torch.randn(20, 7) * 3
    for kept in ("topk:7", "topk:8", "topk:1000"):
        assert torch.equal(through(kept, z), through("topk:7", z))
    assert kl(z, through("topk:7", z)).max() < 1e-6
    assert (through("topk:7", z) - z).abs().max() < 0.01


def test_topk_of_a_certain_teacher_leaves_the_others_next_to_nothing() -> None:
    z = torch.tensor([[900.0, 0.0, -5.0, -900.0], [0.0, 0.0, -1e4, -1e4]])
    p = through("topk:2", z).softmax(dim=1)
    assert torch.allclose(p[:, :2], torch.tensor([[1.0, 0.0], [0.5, 0.5]]), atol=1e-3)
    assert (p[0, 2:] < 1e-8).all()
    assert (p[1, 2:] < 1e-3).all()  # float16's log ½ is no more exact
    assert through("topk:2", z).isfinite().all()


@pytest.mark.parametrize(
    ("num_classes", "number"),
    [(32_768, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (100_000, np.uint32)],
)
def test_classes_of_any_number_are_told_apart(num_classes: int, number: type) -> None:
    z = torch.zeros(3, num_classes)
    wanted = [[num_classes - 1, 32_766], [num_classes - 2, 0], [30_000, 1]]
    for row, (first, second) in enumerate(wanted):
        z[row, first], z[row, second] = 20.0, 19.0
    columns = codec.encode("topk:2", z)
    assert columns["ids"].numpy().dtype == number
    assert columns["ids"].long().tolist() == wanted
    assert through("topk:2", z).topk(2, dim=1).indices.tolist() == wanted


@pytest.mark.parametrize("kept", CODECS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_answer_is_found(kept: str, wrong: float) -> None:
    logits = torch.randn(2000, 10)
    codec.require_finite(codec.encode(kept, logits), "here")
    logits[5:1205, 3] = wrong
    with pytest.raises(
        DivergedError, match=r"^here: the teacher's answers to 1,200 images are not finite"
    ) as caught:
        codec.require_finite(codec.encode(kept, logits), "here")
    assert caught.value.exit_status == 1
    assert "cache.precision" in caught.value.hint
    logits[:] = wrong
    with pytest.raises(DivergedError, match="2,000 images"):
        codec.require_finite(codec.encode(kept, logits), "here")


def test_features_that_overflow_are_found() -> None:
    columns = {"q": torch.zeros(3, 2, dtype=torch.uint8), "feature/a": torch.ones(3, 2, 2).half()}
    codec.require_finite(columns, "here")
    columns["feature/a"][1:, 0, 1] = torch.tensor(1e6).half()
    with pytest.raises(DivergedError, match=r"2 images .* \(feature/a\)"):
        codec.require_finite(columns, "here")


@pytest.mark.parametrize(
    "logits", [[65_600.0, 0.0], [1e6, 1e6], [0.0, -2e7], [-1e9, -2e9], [3e38, -3e38]], ids=str
)
def test_logits_that_a_byte_cannot_stand_for_are_found(logits: list[float]) -> None:
    z = torch.tensor([[1.0, 2.0], logits])
    with pytest.raises(DivergedError, match="1 images"):
        codec.require_finite(codec.encode("int8", z), "here")


@pytest.mark.parametrize("kept", ["fp16", "topk:3"])
def test_log_probabilities_stand_for_logits_of_any_size(kept: str) -> None:
    """What is 65,504 nats behind the first class is so little that it may be a little more."""
    z = torch.tensor([[1e6, 1e6 - 3, 0.0], [-1e6, -1e6, -1e6 - 2], [7e4, 0.0, -7e4]])
    columns = codec.encode(kept, z)
    codec.require_finite(columns, "here")
    assert kl(z, through(kept, z)).max() < 1e-6
    assert torch.equal(through(kept, z)[2], torch.tensor([7e4, 7e4 - 65_504, 7e4 - 65_504]))


def test_codes_never_change() -> None:
    """Caches on disk have them."""
    z = torch.tensor([[2.0, -0.5, 1.25], [-100.7, -100.9, -103.0]])
    columns = codec.encode("int8", z)
    assert columns["q"].tolist() == [[0, 255, 76], [1, 23, 255]]
    assert columns["top"].tolist() == [2.0, -100.6875]
    assert columns["scale"].tolist() == [1286 / 2**17, 1189 / 2**17]
