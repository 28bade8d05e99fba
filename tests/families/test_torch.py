"""Compares ``compat="released"`` with the formulas of the released code, in PyTorch.

Each formula is written after the file that its comment names.  Options are those of
that code.  Features are ``[n, d]``, and maps have PyTorch's order ``[b, c, h, w]``.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import class_means, make_batch, relu_features
from inputs import BALANCED, MAPS_X, MAPS_Y, Y5, S, T, X, Y

import kddm_jax

torch = pytest.importorskip("torch", reason='need PyTorch (pip install -e ".[bench]")')
F = torch.nn.functional
pytestmark = pytest.mark.usefixtures("x64")

# ------------------------------------------------------- HobbitLong/RepDistiller


def pkt(s, t, eps=1e-7):
    """distiller_zoo/PKT.py; mdistiller/distillers/PKT.py is the same."""
    kernels = []
    for z in (s, t):
        z = z / (z.pow(2).sum(1, keepdim=True).sqrt() + eps)
        kernel = (z @ z.T + 1) / 2
        kernels.append(kernel / kernel.sum(1, keepdim=True))
    student, teacher = kernels
    return (teacher * ((teacher + eps) / (student + eps)).log()).mean()


def distances(z):
    """pdist of distiller_zoo/RKD.py."""
    squares = z.pow(2).sum(1)
    squares = squares[:, None] + squares[None, :] - 2 * z @ z.T
    return squares.clamp(min=1e-12).sqrt() * (1 - torch.eye(len(z), dtype=z.dtype))


def rkd_distance(s, t):
    """distiller_zoo/RKD.py; lenscloth/RKD and mdistiller/distillers/RKD.py."""
    scaled = [d / d[d > 0].mean() for d in (distances(s), distances(t))]
    return F.smooth_l1_loss(*scaled)


def rkd_angle(s, t):
    """distiller_zoo/RKD.py; lenscloth/RKD and mdistiller/distillers/RKD.py."""
    edges = [F.normalize(z[None] - z[:, None], p=2, dim=2) for z in (s, t)]
    return F.smooth_l1_loss(*(torch.bmm(e, e.transpose(1, 2)) for e in edges))


def same_height(s, t):
    """The larger map is pooled, as in distiller_zoo/AT.py and NST.py."""
    height = min(s.shape[2], t.shape[2])
    pool = lambda z: F.adaptive_avg_pool2d(z, (height, height))
    return [z if z.shape[2] == height else pool(z) for z in (s, t)]


def attention(s, t, p=2):
    """distiller_zoo/AT.py; mdistiller/distillers/AT.py is the same."""
    s, t = (F.normalize(z.pow(p).mean(1).flatten(1)) for z in same_height(s, t))
    return (s - t).pow(2).mean()


def nst(s, t):
    """distiller_zoo/NST.py; mdistiller/distillers/NST.py is the same."""
    s, t = (F.normalize(z.flatten(2), dim=2) for z in same_height(s, t))
    kernel = lambda a, b: (a[:, None] * b[:, :, None]).sum(-1).pow(2).mean()
    return kernel(t, t).detach() + kernel(s, s) - 2 * kernel(s, t)


def similarity(s, t):
    """distiller_zoo/SP.py; mdistiller/distillers/SP.py is the same."""
    s, t = (F.normalize(z @ z.T) for z in (s, t))
    return (t - s).pow(2).sum() / len(s) ** 2


def kd(s, t, temperature=4.0):
    """distiller_zoo/KD.py; mdistiller/distillers/KD.py is the same."""
    student = F.log_softmax(s / temperature, dim=1)
    teacher = F.softmax(t / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="sum") * temperature**2 / len(s)


def hint(s, t):
    """distiller_zoo/FitNet.py without its regressor, times the number of features."""
    return s.shape[1] * F.mse_loss(s, t)


# ---------------------------------------------------------------- other repositories


def dkd(s, t, labels, alpha=1.0, beta=8.0, temperature=4.0):
    """megvii-research/mdistiller, mdistiller/distillers/DKD.py; weights of cfg.py."""
    own = F.one_hot(labels, s.shape[1])
    divergence = partial(F.kl_div, reduction="sum")

    def pair(logits):
        p = F.softmax(logits / temperature, dim=1)
        return torch.stack([(p * own).sum(1), (p * (1 - own)).sum(1)], dim=1)

    target = divergence(pair(s).log(), pair(t))
    others = [z / temperature - 1000.0 * own for z in (s, t)]
    other = divergence(F.log_softmax(others[0], dim=1), F.softmax(others[1], dim=1))
    return (alpha * target + beta * other) * temperature**2 / len(labels)


def dist(s, t, beta=1.0, gamma=1.0, temperature=4.0):
    """hunto/DIST_KD, segmentation/losses/dist_kd.py, with the temperature's factor.

    open-mmlab/mmrazor's port, DISTLoss, has this factor.
    """

    def relation(a, b):
        a, b = (z - z.mean(1, keepdim=True) for z in (a, b))
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    p, q = (F.softmax(z / temperature, dim=1) for z in (s, t))
    both = beta * relation(p, q) + gamma * relation(p.T, q.T)
    return temperature**2 * both


def jsd(s, t, beta=0.3):
    """huggingface/trl, trl/trainer/gkd_trainer.py, over the batch."""
    p, q = (F.log_softmax(z, dim=-1) for z in (s, t))
    weights = torch.tensor([1 - beta, beta], dtype=s.dtype).log()
    mixture = torch.logsumexp(torch.stack([p + weights[0], q + weights[1]]), dim=0)
    divergence = partial(F.kl_div, mixture, reduction="batchmean", log_target=True)
    return beta * divergence(q) + (1 - beta) * divergence(p)


def kdpp(s, t, labels, means):
    """WangYZ1608/Knowledge-Distillation-via-ND, DirectNormLoss of CIFAR/utils.py."""
    total = 0.0
    for a, b, label in zip(s, t, labels, strict=True):
        direction = means[label] / means[label].norm(p=2)
        longest = max(a.norm(p=2), b.norm(p=2))
        total = total + 1 - torch.dot(a, direction) / longest
    return total / len(labels)


def contrastive(s, t, temperature=0.07):
    """The definition: there is no released code without a memory bank."""
    s, t = F.normalize(s), F.normalize(t)
    return F.cross_entropy(s @ t.T / temperature, torch.arange(len(s)))


def dct(s, t):
    """alexlopezcifuentes/Distillation-Attention, Distillation Zoo/DFTOurs.py."""

    def ranged(z):
        flat = z.flatten(1)
        low, high = flat.min(1)[0], flat.max(1)[0]
        return (z - low[:, None, None]) / high[:, None, None]

    def spectrum(z):
        z = ranged(z.pow(2).mean(1))
        z = z - z.mean((1, 2), keepdim=True)
        return ranged(torch.fft.fft(torch.fft.fft(z, dim=1), dim=2).real.abs())

    return (spectrum(s) - spectrum(t)).pow(2).sum((1, 2)).sqrt().mean()


# ------------------------------------------------------------------------- the tests


class Case(NamedTuple):
    """A released formula, the function that reproduces it, and its options."""

    formula: Callable
    name: str
    inputs: str
    options: dict[str, object]


RELEASED = {"compat": "released"}
CASES = [
    Case(pkt, "pkt", "widths", RELEASED),
    Case(rkd_distance, "rkd_distance", "widths", RELEASED),
    Case(rkd_angle, "rkd_angle", "widths", RELEASED),
    Case(similarity, "similarity_preserving", "widths", {}),
    Case(hint, "paired_l2", "features", {}),
    Case(contrastive, "contrastive", "features", {}),
    Case(kdpp, "kdpp", "classes", {}),
    Case(attention, "attention_transfer", "maps", RELEASED),
    Case(nst, "nst", "maps", {}),
    Case(dct, "attention_dct", "same maps", RELEASED),
    Case(kd, "kd", "logits", {}),
    Case(dkd, "dkd", "labels", {}),
    Case(dist, "dist", "logits", RELEASED | {"temperature": 4.0}),
    Case(jsd, "jsd", "logits", {"beta": 0.3}),
]


def inputs(kind):
    """Yields batches: the six samples of `inputs`, and larger ones like a network's."""
    big = make_batch(16, 12)
    wide = make_batch(16, 20, seed=1)
    rng = np.random.default_rng(0)
    maps = lambda side, c: relu_features(rng, 4 * side**2, c).reshape(4, side, side, c)
    batches = {
        "widths": [(X, Y5), (big.x, wide.y)],
        "features": [(X, Y), (big.x, big.y)],
        "classes": [
            (X, Y, BALANCED, np.float64(class_means(2, 3))),
            (big.x, 0.3 * big.y, big.labels, np.float64(class_means(4, 12))),
        ],
        "maps": [(MAPS_X, MAPS_Y), (maps(8, 6), maps(4, 9)), (maps(3, 5), maps(5, 5))],
        "same maps": [(MAPS_X, MAPS_Y), (maps(7, 6), maps(7, 9))],
        "logits": [(S, T), (big.logits_x, big.logits_y)],
        "labels": [(S, T, BALANCED), (big.logits_x, big.logits_y, big.labels)],
    }
    return batches[kind]


def by_torch(formula, arrays):
    """Returns a formula's value and its gradient by the student's array."""
    tensors = []
    for array in map(np.asarray, arrays):
        array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
        tensors.append(torch.tensor(np.ascontiguousarray(array)))
    tensors = [t if t.is_floating_point() else t.long() for t in tensors]
    student = tensors[0].requires_grad_()
    value = formula(*tensors)
    value.backward()
    gradient = student.grad.numpy()
    gradient = gradient.transpose(0, 2, 3, 1) if gradient.ndim == 4 else gradient
    return float(value.detach()), gradient


def differences(case):
    """Returns the largest relative differences of value and gradient."""
    fn = jax.jit(
        jax.value_and_grad(partial(getattr(kddm_jax, case.name), **case.options))
    )
    of_value = of_gradient = 0.0
    for arrays in inputs(case.inputs):
        value, gradient = fn(*map(jnp.asarray, arrays))
        expected, slope = by_torch(case.formula, arrays)
        assert abs(expected) > 1e-6
        assert np.abs(slope).max() > 1e-8
        of_value = max(of_value, abs(float(value) / expected - 1))
        error = np.abs(gradient - slope).max() / np.abs(slope).max()
        of_gradient = max(of_gradient, float(error))
    return of_value, of_gradient


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_gradient_are_those_of_the_released_code(case):
    of_value, of_gradient = differences(case)
    assert of_value < 1e-12
    assert of_gradient < 1e-11
