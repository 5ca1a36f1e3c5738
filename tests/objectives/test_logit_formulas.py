"""Losses on logits: value and gradient against plain transcriptions of their papers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from distill import component
from distill.errors import IncompatibleError, RecipeError
from distill.objectives._term import Term
from distill.objectives.ctkd import CTKD
from distill.objectives.dist import dist_loss
from distill.objectives.dkd import dkd_loss, label_and_rest
from distill.objectives.kd import KD, kd_loss
from distill.objectives.lskd import lskd_loss, usual_temperature
from distill.objectives.nkd import nkd_loss
from distill.objectives.rld import rld_loss
from distill.objectives.tfkd import tfkd_loss
from distill.objectives.token import Token
from distill.objectives.ttm import ttm_loss
from distill.objectives.wttm import wttm_loss
from distill.types import Anatomy, Batch, Outputs, Pair

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(seed: int, size: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's logits and the labels."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(size, classes, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(classes, (size,), generator=generator)


def softmax(z: Tensor, temperature: float = 1.0) -> Tensor:
    """As it is written in papers."""
    powers = (z / temperature).exp()
    return powers / powers.sum(dim=-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log (p / q), with 0 log 0 = 0."""
    return torch.where(p > 0, p * (p / q.clamp_min(1e-300)).clamp_min(1e-300).log(), 0.0).sum(-1)


def plain_dkd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    rows = []
    for zi, ti, yi in zip(z, t, y.tolist(), strict=True):
        ps, pt = softmax(zi, 4.0), softmax(ti, 4.0)
        others = [k for k in range(len(zi)) if k != yi]
        bs, bt = (torch.stack([p[yi], p[others].sum()]) for p in (ps, pt))
        hs, ht = ps[others] / ps[others].sum(), pt[others] / pt[others].sum()
        rows.append(16 * (1.0 * kl(bt, bs) + 8.0 * kl(ht, hs)))
    return torch.stack(rows)


def plain_nkd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    rows = []
    for zi, ti, yi in zip(z, t, y.tolist(), strict=True):
        others = [k for k in range(len(zi)) if k != yi]
        first = -softmax(ti)[yi] * softmax(zi)[yi].log()
        hs, ht = softmax(zi[others], 2.0), softmax(ti[others], 2.0)
        rows.append(first - 1.5 * 4 * (ht * hs.log()).sum())
    return torch.stack(rows)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def plain_dist(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    ps, pt = softmax(z, 2.0), softmax(t, 2.0)
    intra = 1 - torch.stack([pearson(a, b) for a, b in zip(ps.T, pt.T, strict=True)]).mean()
    inter = torch.stack([1 - pearson(a, b) for a, b in zip(ps, pt, strict=True)])
    return 4 * (1.0 * inter + 0.5 * intra)


def plain_lskd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    def standard(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + 1e-7)

    return 9 * kl(softmax(standard(t), 3.0), softmax(standard(z), 3.0))


def plain_ttm(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    power = softmax(t) ** 0.3
    return kl(power / power.sum(-1, keepdim=True), softmax(z))


def plain_wttm(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return (softmax(t) ** 0.3).sum(-1) * plain_ttm(z, t, y)


def plain_rld(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    rows = []
    for zi, ti, yi in zip(z, t, y.tolist(), strict=True):
        sure, own = softmax(ti, 2.0).max(), softmax(zi, 2.0)[yi]
        first = kl(torch.stack([sure, 1 - sure]), torch.stack([own, 1 - own]))
        below = [k for k in range(len(zi)) if ti[k] < ti[yi]]
        second = zi.sum() * 0
        if below:
            second = kl(softmax(ti[below], 4.0), softmax(zi[below], 4.0))
        rows.append(1.0 * 4 * first + 8.0 * 16 * second)
    return torch.stack(rows)


def plain_tfkd(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    classes = z.shape[1]
    u = torch.full_like(z, 0.01 / max(classes - 1, 1))
    u[torch.arange(len(y)), y] = 0.99
    return 400 * kl(softmax(u.log(), 20.0), softmax(z, 20.0))


def one_hot(y: Tensor, classes: int) -> Tensor:
    return torch.eye(classes)[y]


CASES: dict[str, tuple[Loss, Loss]] = {
    "dkd": (lambda z, t, y: dkd_loss(z, t, y, temperature=4, alpha=1, beta=8), plain_dkd),
    "nkd": (lambda z, t, y: nkd_loss(z, t, y, temperature=2, gamma=1.5), plain_nkd),
    "dist": (lambda z, t, y: dist_loss(z, t, temperature=2, beta=1, gamma=0.5), plain_dist),
    "lskd": (lambda z, t, y: lskd_loss(z, t, temperature=3), plain_lskd),
    "ttm": (lambda z, t, y: ttm_loss(z, t, gamma=0.3), plain_ttm),
    "wttm": (lambda z, t, y: wttm_loss(z, t, gamma=0.3), plain_wttm),
    "rld": (
        lambda z, t, y: rld_loss(z, t, y, temperature=4, sample_temperature=2, alpha=1, beta=8),
        plain_rld,
    ),
    "tfkd": (
        lambda z, t, y: tfkd_loss(z, one_hot(y, z.shape[1]), correct=0.99, temperature=20),
        plain_tfkd,
    ),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_paper(name: str, classes: int, seed: int) -> None:
    ours, plain = CASES[name]
    student, teacher, labels = draw(seed, 9, classes)
    z, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    found, expected = ours(z, teacher, labels), plain(exact, teacher.double(), labels)
    assert found.shape == (9,)
    # float32 holds a logarithm to 1e-7, and T² multiplies what is lost.
    lost = 1e-4 if name == "tfkd" else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=lost)
    found.mean().backward()
    expected.mean().backward()
    assert z.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("classes", [2, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_label_against_the_rest_and_the_rest_by_its_mass(
    classes: int, temperature: float
) -> None:
    student, teacher, labels = draw(1, 16, classes)
    plain = kd_loss(student, teacher, temperature=temperature)
    settings = {"temperature": temperature}
    target = dkd_loss(student, teacher, labels, alpha=1, beta=0, **settings)
    rest = dkd_loss(student, teacher, labels, alpha=0, beta=1, **settings)
    mass = label_and_rest(teacher / temperature, labels)[:, 1].exp()
    torch.testing.assert_close(plain, target + mass * rest, rtol=1e-4, atol=1e-5)


def test_of_two_classes_the_rest_is_one_and_says_nothing() -> None:
    student, teacher, labels = draw(2, 8, 2)
    rest = dkd_loss(student, teacher, labels, temperature=4, alpha=0, beta=8)
    assert rest.abs().max() < 1e-6
    binary = dkd_loss(student, teacher, labels, temperature=4, alpha=1, beta=0)
    torch.testing.assert_close(binary, kd_loss(student, teacher, temperature=4))


def test_standardised_logits_forget_the_teachers_scale_and_offset() -> None:
    student, teacher, _ = draw(3, 8, 10)
    plain = lskd_loss(student, teacher, temperature=2)
    other = lskd_loss(student, 7 * teacher - 30, temperature=2)
    torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        kd_loss(student, teacher, temperature=2), kd_loss(student, 7 * teacher, temperature=2)
    )


@pytest.mark.parametrize(
    ("classes", "temperature"), [(2, 3.49), (3, 1.58), (10, 1.21), (100, 2.00), (1000, 4.33)]
)
def test_the_usual_temperature_gives_the_surest_class_sixty_per_cent(
    classes: int, temperature: float
) -> None:
    assert usual_temperature(classes) == pytest.approx(temperature, abs=0.01)
    z = torch.eye(classes)[:1].double()
    z = (z - z.mean()) / z.std(correction=0)
    assert 0.59 < float(softmax(z, usual_temperature(classes)).max()) < 0.66


def test_a_power_of_probabilities_is_a_factor_of_logits() -> None:
    student, teacher, _ = draw(4, 8, 10)
    expected = kl(softmax(0.25 * teacher.double()), softmax(student.double()))
    found = ttm_loss(student, teacher, gamma=0.25).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ttm_loss(student, teacher, gamma=1.0), kd_loss(student, teacher, temperature=1)
    )


def test_weighted_matching_hears_most_where_the_teacher_hesitates() -> None:
    sure, unsure = torch.tensor([[40.0, 0, 0, 0]]), torch.zeros(1, 4)
    student = torch.tensor([[0.0, 3, 0, 0]])
    for teacher, weight in ((sure, 1.0), (unsure, 4**0.5)):
        ratio = wttm_loss(student, teacher, gamma=0.5) / ttm_loss(student, teacher, gamma=0.5)
        assert float(ratio) == pytest.approx(weight, rel=1e-3)


def test_correlation_forgets_a_positive_affine_map_of_the_probabilities() -> None:
    _, teacher, _ = draw(5, 32, 6)
    p = softmax(teacher)
    other = (0.5 * p + 0.5 / 6).log()  # half as sure, in the same order
    assert float(dist_loss(other, teacher, temperature=1, beta=1, gamma=1).abs().max()) < 1e-4


def test_refined_logits_hear_nothing_of_classes_that_a_wrong_teacher_prefers() -> None:
    teacher = torch.tensor([[1.0, 5.0, 3.0, -1.0, 0.0]])
    label = torch.tensor([0])  # the teacher would say 1, then 2
    z = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    settings = {"temperature": 4.0, "sample_temperature": 1.0}
    rld_loss(z, teacher, label, alpha=0, beta=1, **settings).sum().backward()
    assert z.grad is not None
    assert z.grad[0, :3].abs().max() == 0
    assert z.grad[0, 3:].abs().min() > 0
    right = torch.tensor([[9.0, 5.0, 3.0, -1.0, 0.0]])
    torch.testing.assert_close(  # where the teacher is right it is decoupled distillation
        rld_loss(z, right, label, alpha=0, beta=1, **settings),
        dkd_loss(z, right, label, temperature=4, alpha=0, beta=1),
    )
    torch.testing.assert_close(
        rld_loss(z, right, label, alpha=1, beta=0, **settings),
        dkd_loss(z, right, label, temperature=1, alpha=1, beta=0),
    )


def batch(labels: Tensor) -> Batch:
    ids = torch.arange(len(labels))
    return Batch(torch.zeros(len(labels), 3, 1, 1), labels, ids, torch.zeros_like(ids))


def term(name: str, **arguments: object) -> Term:
    found = component.build("objectives", name, arguments)
    assert isinstance(found, Term)
    return found


def test_several_temperatures_are_averaged() -> None:
    student, teacher, labels = draw(6, 8, 10)
    told, data = (Outputs(student), Outputs(teacher)), batch(one_hot(labels, 10))
    found = term("kd", temperature=[2, 3, 4])(*told, data)
    single = [term("kd", temperature=t)(*told, data) for t in (2, 3, 4)]
    torch.testing.assert_close(found, torch.stack(single).mean(dim=0))
    assert term("kd", temperature=[1, 1]).needs_tail is False
    assert term("kd", temperature=[1, 2]).needs_tail is True
    with pytest.raises(RecipeError, match="an empty list"):
        KD(temperature=[])


@pytest.mark.parametrize("name", ["dkd", "nkd", "rld"])
def test_of_a_mixed_label_the_larger_counts(name: str) -> None:
    student, teacher, labels = draw(13, 8, 5)
    told, sure = (Outputs(student), Outputs(teacher)), one_hot(labels, 5)
    mixed = 0.7 * sure + 0.3 * sure.roll(1, 1)
    found = term(name)(*told, batch(mixed))
    torch.testing.assert_close(found, term(name)(*told, batch(sure)))
    assert not torch.allclose(found, term(name)(*told, batch(sure.roll(1, 1))))


def test_over_images_even_classes_that_no_teacher_ranks_high_count() -> None:
    student, noise, labels = draw(14, 64, 200)
    told = 2 / 3 * student + 12 * one_hot(labels, 200)
    student = told + noise / 3
    top = told.softmax(dim=1).topk(10)  # nine tenths of the mass
    rest = (1 - top.values.sum(dim=1, keepdim=True)) / 190
    cut = rest.expand(-1, 200).scatter(1, top.indices, top.values).log()
    for beta, gamma, tail in ((1, 0, False), (0, 1, True)):
        found, exact = (
            float(dist_loss(student, teacher, temperature=1, beta=beta, gamma=gamma).mean())
            for teacher in (cut, told)
        )
        assert (abs(found / exact - 1) > 0.3) is tail
        assert term("dist", beta=beta, gamma=gamma).needs_tail is tail


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_an_ensemble_pulls_as_its_members_do_together(temperature: float) -> None:
    student, _, labels = draw(7, 8, 10)
    members = [Outputs(draw(seed, 8, 10)[1]) for seed in (8, 9, 10)]
    shares = (0.5, 0.3, 0.2)
    ensemble = Outputs(members[0].logits, members=tuple(members), shares=shares)
    ensemble = ensemble._replace(logits=ensemble.softened(1.0))
    kd = term("kd", temperature=temperature)
    data, gradients, values = batch(one_hot(labels, 10)), [], []
    for heard in ([(1.0, ensemble)], list(zip(shares, members, strict=True))):
        z = student.clone().requires_grad_()
        value = torch.stack([share * kd(Outputs(z), one, data) for share, one in heard]).sum(0)
        value.sum().backward()
        gradients.append(z.grad)
        values.append(value.detach())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert (values[0] <= values[1] + 1e-5).all()  # they differ by how much the members disagree
    mixed = sum(
        share * softmax(one.logits.double(), temperature)
        for share, one in zip(shares, members, strict=True)
    )
    found = (ensemble.softened(temperature) / temperature).double().softmax(dim=1)
    torch.testing.assert_close(found, mixed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_members_are_softened_before_they_are_averaged(seed: int) -> None:
    student, _, labels = draw(seed, 16, 6)
    members = [Outputs(draw(20 + 3 * seed + i, 16, 6)[1]) for i in range(3)]
    shares = (0.5, 0.3, 0.2)
    ensemble = Outputs(members[0].logits, members=tuple(members), shares=shares)
    ensemble = ensemble._replace(logits=ensemble.softened(1.0))
    told, data = (Outputs(student), ensemble), batch(one_hot(labels, 6))

    def mean(i: int, temperature: float) -> Tensor:
        speak = [softmax(member.logits[i].double(), temperature) for member in members]
        return sum((p * share for p, share in zip(speak, shares, strict=True)), torch.zeros(()))

    nkd, rld, dkd = [], [], []
    for i, y in enumerate(labels.tolist()):
        z, once, soft = student[i].double(), mean(i, 1.0), mean(i, 4.0)
        others = [k for k in range(6) if k != y]
        among = softmax(z[others], 4.0)
        rest = soft[others] / soft[others].sum()
        nkd.append(-once[y] * softmax(z)[y].log() - 1.5 * 16 * (rest * among.log()).sum())
        own, sure = softmax(z, 4.0)[y], soft[y]
        binary = kl(torch.stack([sure, 1 - sure]), torch.stack([own, 1 - own]))
        dkd.append(16 * (binary + 8 * kl(rest, among)))
        own, sure = softmax(z)[y], once.max()
        first = kl(torch.stack([sure, 1 - sure]), torch.stack([own, 1 - own]))
        below = [k for k in range(6) if once[k] < once[y]]
        among = kl(soft[below] / soft[below].sum(), softmax(z[below], 4.0)) if below else 0.0
        rld.append(first + 8 * 16 * among)
    for name, rows in (("nkd", nkd), ("rld", rld), ("dkd", dkd)):
        found = term(name, temperature=4.0)(*told, data).double()
        torch.testing.assert_close(found, torch.stack(rows), rtol=2e-4, atol=2e-4)


def test_the_learned_temperature_works_against_the_student() -> None:
    student, teacher, labels = draw(11, 16, 10)
    told, data = (Outputs(student), Outputs(teacher)), batch(one_hot(labels, 10))
    ctkd = CTKD(start=4.0, warmup=0.1)
    assert float(ctkd.temperature().detach()) == pytest.approx(4.0, rel=1e-4)
    theta = ctkd.theta.detach().double().requires_grad_()
    temperature = 1 + 20 * theta.sigmoid()
    p, q = (softmax(z.double(), temperature) for z in (teacher, student))
    (temperature**2 * kl(p, q)).mean().backward()
    assert theta.grad is not None
    for progress, strength in ((0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.9, 1.0)):
        ctkd.set_progress(progress)
        ctkd.zero_grad()
        ctkd(*told, data).mean().backward()
        assert ctkd.theta.grad is not None
        reversed_ = -strength * float(theta.grad)
        assert float(ctkd.theta.grad) == pytest.approx(reversed_, rel=1e-3, abs=1e-6)
    torch.testing.assert_close(ctkd(*told, data), kd_loss(student, teacher, temperature=4.0))


def test_the_learned_temperature_is_kept_and_its_strength_is_not_compiled_in() -> None:
    student, teacher, labels = draw(11, 16, 10)
    told, data = (Outputs(student), Outputs(teacher)), batch(one_hot(labels, 10))
    ctkd = CTKD(warmup=0.1)
    assert set(ctkd.state_dict()) == {"theta"}  # the strength follows from the progress
    counted = CompileCounter()
    compiled = torch.compile(ctkd, fullgraph=True, backend=counted)
    pulls = []
    for progress in (0.01, 0.05, 0.1):
        ctkd.set_progress(progress)
        ctkd.zero_grad()
        compiled(*told, data).mean().backward()
        pulls.append(float(ctkd.theta.grad))  # type: ignore[arg-type]
    assert counted.frame_count == 1
    assert 0 < pulls[0] / pulls[2] < pulls[1] / pulls[2] < 1
    torch._dynamo.reset()


@pytest.mark.parametrize("start", [0.5, 1.0, 21.0, 50.0])
def test_a_start_outside_of_the_temperatures_is_refused(start: float) -> None:
    with pytest.raises(RecipeError, match=rf"start: {start:g} is no temperature between 1 and 21"):
        term("ctkd", start=start)


def test_a_student_without_a_token_is_refused() -> None:
    plain, other = (Anatomy(n, 6, n == "distilled", {}, (), (), ()) for n in ("vit", "distilled"))
    Token().connect(Pair(other, plain, 10, torch.arange(4)))
    with pytest.raises(IncompatibleError, match="vit has no distillation token"):
        Token().connect(Pair(plain, other, 10, torch.arange(4)))


def test_the_token_hears_the_teacher_and_the_class_head_does_not() -> None:
    student, teacher, labels = draw(12, 8, 10)
    token = torch.randn(8, 10).requires_grad_()
    told, data = Outputs(student.requires_grad_(), {"token": token}), batch(one_hot(labels, 10))
    hard = Token()(told, Outputs(teacher), data)
    first = teacher.argmax(dim=1)
    torch.testing.assert_close(hard, -softmax(token)[torch.arange(8), first].log())
    soft = Token(kind="soft", temperature=2)(told, Outputs(teacher), data)
    torch.testing.assert_close(soft, kd_loss(token, teacher, temperature=2))
    (hard + soft).sum().backward()
    assert token.grad is not None
    assert student.grad is None


def test_the_virtual_teacher_is_right_and_equally_unsure_of_the_rest() -> None:
    labels = torch.tensor([[0.0, 1, 0, 0]])
    best = math.log(0.99 / (0.01 / 3))
    logits = torch.tensor([[0.0, best, 0, 0]])
    value = tfkd_loss(logits, labels, correct=0.99, temperature=20)
    assert float(value) == pytest.approx(0, abs=1e-4)
    mixed = tfkd_loss(logits, torch.tensor([[0.5, 0.5, 0, 0]]), correct=0.99, temperature=1)
    u = torch.tensor([0.5 * 0.99 + 0.005 / 3] * 2 + [0.01 / 3] * 2).double()
    torch.testing.assert_close(
        mixed[0].double(), kl(u, softmax(logits[0].double())), rtol=1e-4, atol=1e-5
    )
