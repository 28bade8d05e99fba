"""Tests ``compat="released"`` against the released PyTorch code's numbers.

`test_torch.py` computes those of other repositories again where PyTorch is installed.
The numbers and gradients of the first table were computed once by PyTorch 2.13 (CPU,
float64) and POT 0.9.7, from the functions of eddardd/kddm, ``src/utils.py``, in which
``torch.Tensor(0.0, device=...)``, which raises, was replaced by zero. A slope is the
sum of the student's gradient times DIRECTION.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import BALANCED, MAPS_X, MAPS_Y, UNBALANCED, Y5, S, T, X, Y, i, j

import kddm_jax

pytestmark = pytest.mark.usefixtures("x64")

DIRECTION = np.cos(i + j)

BAL, UNBAL = (X, Y, BALANCED), (X, Y, UNBALANCED)
LINEAR, KL = {"kernel": "linear"}, {"label_cost": "kl"}

# function, arrays, options, value, slope, index of the argument of the slope
RELEASED = [
    ("wasserstein", (X, Y), {}, 1.9262218449395891, 0.3052035672729832, 0),
    ("class_wasserstein", BAL, {}, 5.005921642437987, 2.117451814293429, 0),
    ("class_wasserstein", UNBAL, {}, 5.397375502757803, 1.4352579487588135, 0),
    ("joint_wasserstein", (X, Y, S, T), {}, 2.5058852319698177, 0.15732339085286642, 2),
    ("joint_wasserstein", (X, Y, S, T), KL, 0.382805858548972, 0.12159219844840993, 2),
    ("gaussian_wasserstein", (X, Y), {}, 0.9774150910961514, -0.11714159415542805, 0),
    (
        "class_gaussian_wasserstein",
        BAL,
        {},
        2.3170955427861433,
        -0.23254915928689107,
        0,
    ),
    ("class_gaussian_wasserstein", UNBAL, {}, 4.372545343224926, 0.3122913571937669, 0),
    ("gaussian_kl", (X, Y), {}, 0.9879549855831983, -0.32816094787409067, 0),
    ("class_gaussian_kl", BAL, {}, 3.894771785496827, 0.2944847577692399, 0),
    ("class_gaussian_kl", UNBAL, {}, 6.38251602826113, -7.363115784516489, 0),
    ("class_mmd", UNBAL, LINEAR, 3.4726326003969414, 1.878034798511259, 0),
    ("class_mmd", BAL, {}, 0.6437043055510215, -0.04467876666522793, 0),
    ("class_mmd", UNBAL, {}, 1.0123819570144414, 0.005432561458203117, 0),
    ("kd", (S, T), {}, 0.5711709728200536, 0.3088510887813308, 0),
]
# These have no option: they always equal the released code.
AS_RELEASED = [
    ("mmd", (X, Y), {}, 0.24222794596483954, -0.03311774804495314, 0),
]


# The same for the formulas in `test_torch.py`, with the options of those repositories;
# the slope of maps is along cos of their positions 0, 1, ... in memory.
WIDER, MAPS, SHARP = (X, Y5), (MAPS_X, MAPS_Y), {"temperature": 4.0}
ELSEWHERE = [
    ("pkt", WIDER, {}, 0.12508155043320954, 0.012027433785832174, 0),
    ("rkd_distance", WIDER, {}, 0.1455986278816014, -0.05696828044224894, 0),
    ("rkd_angle", WIDER, {}, 0.13976159245552378, -0.047938793839047124, 0),
    ("attention_transfer", MAPS, {}, 0.030266306803163594, 0.010256718415155283, 0),
    ("attention_dct", MAPS, {}, 1.7677640936232795, -1.2481078559709862, 0),
    ("dist", (S, T), SHARP, 27.75661922535205, -2.1126898310958238, 0),
]
NO_OPTION = {"mmd", "dkd", "jsd", "contrastive"}
AS_RELEASED += [
    ("dkd", (S, T, BALANCED), {}, 2.6286648817833256, 2.606066073391798, 0),
    ("jsd", (S, T), {"beta": 0.3}, 0.08998654285084534, 0.035045661823952814, 0),
    ("contrastive", (X, Y), {}, 13.520439308586612, -1.83702555178858, 0),
]


def released(name, argnum, **options):
    fn = getattr(kddm_jax, name)
    if name not in NO_OPTION:
        options["compat"] = "released"
    return jax.jit(jax.value_and_grad(partial(fn, **options), argnums=argnum))


@pytest.mark.parametrize(
    "case", RELEASED + AS_RELEASED + ELSEWHERE, ids=lambda c: f"{c[0]}-{c[3]:.4g}"
)
def test_value_and_gradient(case):
    name, arrays, options, value, slope, argnum = case
    out, gradient = released(name, argnum, **options)(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(out, value, rtol=1e-9)
    direction = DIRECTION
    if gradient.ndim == 4:
        direction = np.cos(np.arange(gradient.size)).reshape(gradient.shape)
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-8)


CONDITIONAL = [
    *("class_wasserstein", "class_gaussian_wasserstein"),
    *("class_gaussian_kl", "class_mmd"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITIONAL)
def test_padding_has_no_part(name):
    labels = np.append(UNBALANCED, [-1, -1])
    extended = [np.concatenate([z, 9 + z[:2] ** 2]) for z in (X, Y)]
    fn = released(name, 0)
    value, gradient = fn(*map(jnp.asarray, (*extended, labels)))
    expected, expected_gradient = fn(*map(jnp.asarray, UNBAL))
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(gradient[:6], expected_gradient, atol=1e-9)
    np.testing.assert_array_equal(gradient[6:], 0)


@pytest.mark.parametrize(
    ("key", "value"), [("cw2", 5.397375502757803), ("kd", 0.5711709728200536)]
)
def test_the_loss_passes_it_on(key, value):
    fn = partial(kddm_jax.distill_loss, distance=key, weight=1.0, compat="released")
    _, terms = jax.jit(fn)(X, Y, UNBALANCED, S, T)
    np.testing.assert_allclose(terms[key], value, rtol=1e-9)


def test_joint_does_not_see_the_teachers_features():
    fn = released("joint_wasserstein", (0, 1))
    value, gradients = fn(X, 100 * Y + 7, S, T)
    np.testing.assert_allclose(value, 2.5058852319698177, rtol=1e-9)
    for gradient in gradients:  # and all its gradients are zero
        np.testing.assert_array_equal(gradient, 0)


def test_divergence_is_infinite_for_a_dead_feature_of_the_teacher():
    dead = Y * [1, 0, 1]
    assert released("gaussian_kl", 0)(X, dead)[0] == -np.inf
    assert np.isfinite(kddm_jax.gaussian_kl(jnp.asarray(X), jnp.asarray(dead)))


@pytest.mark.parametrize(
    ("name", "arrays", "options", "message"),
    [
        ("wasserstein", (X, Y), {"solver": "entropic"}, "solver='exact'.*'entropic'"),
        ("class_wasserstein", BAL, {"reduction": "weighted"}, "reduction='sum'"),
        ("joint_wasserstein", (X, Y, S, T), {"beta": 2.0}, "beta='max', got beta=2.0"),
        ("gaussian_kl", (X, Y), {"ridge": 0.1}, "ridge=None, got ridge=0.1"),
        ("class_gaussian_kl", BAL, {"covariance": "full"}, "covariance='diag'"),
        ("class_mmd", BAL, {"bandwidth": 1.0}, "bandwidth=None, got bandwidth=1.0"),
        (
            "kd",
            (S, T),
            {"compat": "kddm"},
            'compat must be None or "released", got \'kd',
        ),
    ],
)
def test_contradictions_are_refused(name, arrays, options, message):
    options = {"compat": "released", **options}
    with pytest.raises(ValueError, match=message):
        getattr(kddm_jax, name)(*map(jnp.asarray, arrays), **options)
