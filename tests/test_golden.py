"""Tests numbers that NumPy, SciPy and POT computed once in float64.

They are for six samples given by formulas. Both the textbook forms in `reference` and
the library must give them.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from inputs import BALANCED, MAPS_X, MAPS_Y, UNBALANCED, Y5, S, T, X, Y

import kddm_jax
from kddm_jax.families.sliced import _sliced

pytestmark = pytest.mark.usefixtures("x64")

EXACT = {"solver": "exact"}
LOGITS, PROBS, KL = ({"label_cost": name} for name in ("logits", "probs", "kl"))
DIAG, FULL = {"covariance": "diag"}, {"covariance": "full"}
SUM, WEIGHTED = {"reduction": "sum"}, {"reduction": "weighted"}
REVERSED = {"direction": "teacher||student"}
# The released code adds 1e-9 to standard deviations of order one, so there is no ridge.
BARE = {"ridge": 0.0}
FEATURES, WIDER, JOINT, LOGIT = (X, Y), (X, Y5), (X, Y, S, T), (S, T)
FEWER = (X, Y[:4])
MAPS, SAME_CHANNELS = (MAPS_X, MAPS_Y), (MAPS_X, MAPS_Y[..., :3])
BAL, UNBAL = (X, Y, BALANCED), (X, Y, UNBALANCED)


def sinkhorn(solver, epsilon):
    return {"solver": solver, "epsilon": epsilon}


# Computed by NumPy, SciPy (`linear_sum_assignment`, `linalg.sqrtm`) and POT (`ot.emd2`,
# `ot.sinkhorn2`), in full precision.
GOLDEN = [
    ("paired_l2", FEATURES, {}, 3.40247721887024),
    ("wasserstein", FEATURES, EXACT, 1.9262218449395894),
    ("wasserstein", FEATURES, sinkhorn("entropic", 0.5), 2.6202599901100205),
    ("wasserstein", FEATURES, sinkhorn("sinkhorn", 0.5), 1.8926325312428496),
    ("class_wasserstein", BAL, EXACT, 2.502960821218994),
    ("class_wasserstein", BAL, EXACT | SUM, 5.005921642437988),
    ("class_wasserstein", BAL, EXACT | WEIGHTED, 2.502960821218994),
    ("class_wasserstein", UNBAL, EXACT, 2.698687751378901),
    ("class_wasserstein", UNBAL, EXACT | SUM, 5.397375502757802),
    ("class_wasserstein", UNBAL, EXACT | WEIGHTED, 2.430421315712414),
    ("joint_wasserstein", JOINT, EXACT | LOGITS | {"beta": 1.0}, 4.978035005909097),
    ("joint_wasserstein", JOINT, EXACT | PROBS | {"beta": 1.0}, 2.079432558131645),
    ("joint_wasserstein", JOINT, EXACT | KL | {"beta": 1.0}, 2.1611458879338894),
    ("joint_wasserstein", JOINT, EXACT | PROBS | {"beta": 0.0}, 1.9262218449395894),
    ("gaussian_wasserstein", FEATURES, FULL, 1.8188148034283695),
    ("gaussian_wasserstein", FEATURES, DIAG, 0.9774150910961513),
    ("class_gaussian_wasserstein", BAL, FULL, 2.064178159718954),
    ("class_gaussian_wasserstein", BAL, FULL | SUM, 4.128356319437908),
    ("class_gaussian_wasserstein", BAL, DIAG, 1.1585477713930716),
    ("class_gaussian_wasserstein", BAL, DIAG | SUM, 2.3170955427861433),
    ("gaussian_kl", FEATURES, DIAG | BARE, 0.9879549962754199),
    ("gaussian_kl", FEATURES, DIAG | BARE | REVERSED, 1.3975540822173869),
    ("gaussian_kl", FEATURES, FULL | {"ridge": 1e-3}, 75.87298105989106),
    ("gaussian_kl", FEATURES, FULL | {"ridge": 1e-3} | REVERSED, 225.12448632614345),
    ("class_gaussian_kl", BAL, DIAG | BARE, 1.9473859104448812),
    ("class_gaussian_kl", BAL, DIAG | BARE | SUM, 3.8947718208897624),
    ("mmd", FEATURES, {"kernel": "linear"}, 0.9493633219493844),
    ("mmd", FEATURES, {}, 0.24222794596483976),
    ("mmd", FEATURES, {"bandwidth": 1.5463455472126444}, 0.24222794596483976),
    # Computed with scikit-learn's `rbf_kernel`; the bandwidth is the mean same-class
    # distance.
    ("class_mmd", BAL, {}, 0.3313178050344181),
    ("class_mmd", UNBAL, {}, 0.5074329560762192),
    ("class_mmd", UNBAL, WEIGHTED, 0.4258190903696595),
    ("kd", LOGIT, {"temperature": 4.0}, 0.570094714379916),
    ("kd", LOGIT, {"direction": "student||teacher"}, 0.5711709728200537),
    ("kd", LOGIT, {"standardize": True}, 16 * 0.03551312087348862),  # T^2 = 16
    ("procrustes", FEATURES, {}, 0.647220987295114),
    ("procrustes", WIDER, {}, 0.7243095020022774),
    ("feature_gram", FEATURES, {}, 0.9967191470342699**2),
    ("feature_gram", WIDER, {}, 1.0100932840175534**2),
    ("cka", FEATURES, {}, 1 - 0.336109572932501),
    ("cka", WIDER, {}, 1 - 0.31032408169342496),
    ("similarity_preserving", WIDER, {}, 0.25060763347124104),
    ("linear_projection", WIDER, {}, 0.4094944977421223),
    ("pkt", WIDER, {}, 1.0296669378961827),
    ("rkd_distance", WIDER, {}, 0.1747183534579218),
    ("rkd_angle", WIDER, {}, 0.2515708664199428),
    ("contrastive", FEATURES, {"temperature": 0.5}, 2.540335718340016),
    ("jsd", LOGIT, {}, 0.10405439847800639),
    ("dkd", (S, T, BALANCED), {}, 2.628664881783332),
    ("dist", LOGIT, {}, 1.7696271700572848),
    ("attention_transfer", MAPS, {}, 0.48426090885061746),
    # Computed with SciPy's `fft.dctn`.
    ("attention_dct", MAPS, {}, 0.4842025498833846),
    ("attention_dct", MAPS, {"frequencies": 2}, 0.0030003590675934284),
    ("nst", MAPS, {"kernel": "linear"}, 2.994433133675723),
    ("nst", MAPS, {}, 0.6849185845998721),
    ("wkd_features", SAME_CHANNELS, {"ratio": 0.0}, 0.0012628081945667178),
    (
        "wkd_features",
        SAME_CHANNELS,
        {"ratio": 1.0},
        0.013859151418736063 + 0.0012628081945667178,
    ),
    ("wkd_features", SAME_CHANNELS, {"grid": 2, "ratio": 0.0}, 0.14551563464427003),
    (
        "wkd_features",
        SAME_CHANNELS,
        {"grid": 2, "ratio": 1.0},
        1.7704177584833878 + 0.14551563464427003,
    ),
    # Computed by POT 0.9.7: `ot.gromov.gromov_wasserstein2` with
    # `loss_fun="square_loss"` and SciPy's `cdist`, the smaller result from its own
    # start and from the identity; and `entropic_gromov_wasserstein`, energy + eps KL of
    # its plan.
    ("gromov_wasserstein", FEATURES, {}, 0.30813059909831436),
    ("gromov_wasserstein", WIDER, {}, 1.7443380564806543),
    ("gromov_wasserstein", FEWER, {}, 0.3387539852574313),
    ("gromov_wasserstein", FEATURES, {"metric": "sqeuclidean"}, 1.8110019632260927),
    ("gromov_wasserstein", WIDER, {"metric": "sqeuclidean"}, 21.597402746444516),
    ("gromov_wasserstein", FEWER, {"metric": "sqeuclidean"}, 4.521959417801521),
    ("gromov_wasserstein", FEATURES, {"metric": "cosine"}, 0.19700863357708087),
    ("gromov_wasserstein", WIDER, {"metric": "cosine"}, 0.5220819127696732),
    ("gromov_wasserstein", FEWER, {"metric": "cosine"}, 0.15214917533571087),
    ("gromov_wasserstein", FEATURES, {"epsilon": 0.5}, 0.8088248310114552),
]

# These have only eight decimals.
GOLDEN_ROUNDED = [
    ("class_gaussian_wasserstein", UNBAL, FULL, 2.61745853),
    ("class_gaussian_wasserstein", UNBAL, FULL | WEIGHTED, 2.32211568),
]


# If the plan is nearly a permutation, Sinkhorn's iteration stalls: POT stopped 4e-6
# below the optimum. Newton's method reaches it, with marginals exact to 1e-12.
GOLDEN_SLOW = [
    ("wasserstein", FEATURES, sinkhorn("entropic", 0.05), 2.015792314926391),
    ("wasserstein", FEATURES, sinkhorn("sinkhorn", 0.05), 1.9262288895550932),
]


def describe(case):
    name, arrays, options, value = case
    which = {id(UNBAL): "unbalanced", id(WIDER): "wider", id(FEWER): "fewer"}
    which = which.get(id(arrays), "")
    return "-".join([name, which, *map(str, options.values()), f"{value:.4g}"])


def by_reference(name, arrays, options):
    options = dict(options)
    if "covariance" in options:  # the function's argument has this name
        options["covariance_type"] = options.pop("covariance")
    return getattr(reference, name)(*arrays, **options)


def by_library(name, arrays, options):
    options = dict(options)
    if name == "gromov_wasserstein":
        pass  # it has no options for its solver
    elif "epsilon" in options:
        options |= {"threshold": 1e-8, "max_iterations": 20_000}
    return compiled(name, **options)(*map(jnp.asarray, arrays))


@cache
def compiled(name, **options):
    return jax.jit(partial(getattr(kddm_jax, name), **options))


WITNESSES = pytest.mark.parametrize(
    "compute", [by_reference, by_library], ids=["reference", "library"]
)


@WITNESSES
@pytest.mark.parametrize("case", GOLDEN, ids=describe)
def test_value(case, compute):
    name, arrays, options, expected = case
    # The released code's ridge changes KL by 1e-8; all other numbers are exact.
    rtol = 1e-7 if options.get("ridge") == 0.0 else 1e-9
    np.testing.assert_allclose(compute(name, arrays, options), expected, rtol=rtol)


@WITNESSES
@pytest.mark.parametrize("case", GOLDEN_ROUNDED, ids=describe)
def test_rounded_value(case, compute):
    name, arrays, options, expected = case
    np.testing.assert_allclose(compute(name, arrays, options), expected, atol=6e-9)


@WITNESSES
@pytest.mark.parametrize("case", GOLDEN_SLOW, ids=describe)
def test_value_near_a_permutation(case, compute):
    name, arrays, options, expected = case
    np.testing.assert_allclose(compute(name, arrays, options), expected, rtol=1e-5)


# Computed by POT, `ot.sliced_wasserstein_distance(..., projections=DIRECTIONS) ** 2`.
DIRECTIONS = np.sin(1 + np.arange(3)[:, None] + 2.0 * np.arange(5)[None, :])
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=0)
SLICED = [(FEATURES, 0.703772185203669), (FEWER, 0.816315464802076)]


@pytest.mark.parametrize("compute", [reference.sliced_wasserstein, jax.jit(_sliced)])
@pytest.mark.parametrize(("pair", "expected"), SLICED, ids=["equal", "fewer"])
def test_sliced(pair, expected, compute):
    np.testing.assert_allclose(compute(*pair, DIRECTIONS), expected, rtol=1e-9)


def test_pot_gives_its_numbers_again(monkeypatch):
    for backend in ("PYTORCH", "JAX", "TENSORFLOW", "CUPY"):  # only NumPy is needed
        monkeypatch.setenv(f"POT_BACKEND_DISABLE_{backend}", "1")
    ot = pytest.importorskip("ot", reason='need POT (pip install -e ".[bench]")')
    a = np.full(6, 1 / 6)

    def entropic(x, y, epsilon=0.5):
        cost = ot.dist(x, y)
        plan = ot.sinkhorn(a, a, cost, epsilon, stopThr=1e-14, numItermax=100_000)
        return np.sum(plan * (cost + epsilon * np.log(plan * 36)))

    between, within_x, within_y = entropic(X, Y), entropic(X, X), entropic(Y, Y)
    distances = [ot.dist(z, z, "euclidean") for z in (X, Y)]
    starts = (None, np.eye(6) / 6)
    local = [ot.gromov.gromov_wasserstein2(*distances, a, a, G0=s) for s in starts]
    of_pot = [
        ("wasserstein", EXACT, ot.emd2(a, a, ot.dist(X, Y))),
        ("wasserstein", sinkhorn("entropic", 0.5), between),
        ("wasserstein", sinkhorn("sinkhorn", 0.5), between - (within_x + within_y) / 2),
        ("gromov_wasserstein", {}, min(local)),
    ]
    golden = [
        next(case[3] for case in GOLDEN if case[:3] == (name, FEATURES, options))
        for name, options, _ in of_pot
    ]
    np.testing.assert_allclose([value for *_, value in of_pot], golden, rtol=1e-9)
    sliced = ot.sliced_wasserstein_distance(X, Y, projections=DIRECTIONS) ** 2
    np.testing.assert_allclose(sliced, SLICED[0][1], rtol=1e-9)


# Three classes, and another without probability, which is removed as the label's. The
# cost is sharpened and 1e-8 is added, as in the released code.
CLASS_DISTANCE = np.array([[0.0, 0.3, 0.9], [0.3, 0.0, 0.6], [0.9, 0.6, 0.0]])
CLASS_COST = 1 - np.exp(-CLASS_DISTANCE) + 1e-8
GOLDEN_WKD = [
    ({"iterations": 10}, 0.04767484723164114, 1e-9),
    # After thousands of iterations; the 1e-8 in their divisions changes the limit by
    # 1e-5.
    ({}, 0.08144986, 2e-5),
]


def jitted_wkd(*arrays, **options):
    return jax.jit(partial(kddm_jax.wkd_logits, **options))(*arrays)


@pytest.mark.parametrize("compute", [reference.wkd_logits, jitted_wkd])
@pytest.mark.parametrize(("options", "expected", "rtol"), GOLDEN_WKD)
def test_wkd(options, expected, rtol, compute):
    s, t = (np.pad(z, [(0, 0), (0, 1)], constant_values=-500.0) for z in (S, T))
    cost = np.pad(CLASS_COST, [(0, 1), (0, 1)])
    options = {"class_cost": cost, "temperature": 2.0, **options}
    value = compute(s, t, np.full(6, 3), **options)
    np.testing.assert_allclose(value, expected, rtol=rtol)


def test_reference_cost_without_entropy():
    values = [
        reference.linear_programme(CLASS_COST, p, q)
        for p, q in zip(*(reference.softmax(z / 2) for z in (S, T)), strict=True)
    ]
    np.testing.assert_allclose(np.mean(values), 0.0802541868030222, rtol=1e-9)


@WITNESSES
def test_joint_with_beta_max_is_the_released_scaling_times_the_largest_cost(compute):
    # The released code divides the feature cost by its maximum. Here beta is this
    # maximum and nothing is divided, which multiplies the minimum by the maximum.
    largest = reference.largest_feature_cost(X, Y)
    value = compute("joint_wasserstein", JOINT, EXACT | LOGITS | {"beta": "max"})
    np.testing.assert_allclose(value / largest, 2.486837830722264, rtol=1e-9)


@WITNESSES
def test_joint_is_not_the_released_cost_within_the_student(compute):
    # In the released code, the feature cost compares the student with itself.
    largest = reference.largest_feature_cost(X, Y)
    value = compute("joint_wasserstein", JOINT, EXACT | LOGITS | {"beta": "max"})
    assert abs(value / largest - 2.5058852319698177) > 1e-3


@WITNESSES
def test_joint_with_one_hot_predictions_and_a_large_beta_is_class_conditional(compute):
    one_hot = np.where(np.eye(2)[BALANCED] > 0, 0.0, -1e3)  # probabilities of 1 and 0
    options = EXACT | PROBS | {"beta": 1e4}
    value = compute("joint_wasserstein", (X, Y, one_hot, one_hot), options)
    np.testing.assert_allclose(value, 2.502960821218994, rtol=1e-9)


@WITNESSES
def test_chain_of_lower_and_upper_bounds(compute):
    steps = [
        ("mmd", FEATURES, {"kernel": "linear"}),
        ("gaussian_wasserstein", FEATURES, DIAG),
        ("gaussian_wasserstein", FEATURES, FULL),
        ("wasserstein", FEATURES, EXACT),
        ("class_wasserstein", BAL, EXACT | WEIGHTED),
        ("paired_l2", FEATURES, {}),
    ]
    expected = [
        0.9493633219493844,
        0.9774150910961513,
        1.8188148034283695,
        1.9262218449395894,
        2.502960821218994,
        3.40247721887024,
    ]
    np.testing.assert_allclose([compute(*s) for s in steps], expected, rtol=1e-9)


def test_reference_plan_bandwidth_and_transport_cost():
    cost = reference.squared_distances(X, Y)
    _, columns = reference.linear_sum_assignment(cost)
    np.testing.assert_array_equal(columns, [0, 5, 4, 3, 2, 1])
    np.testing.assert_allclose(reference.mean_distance(X, Y), 1.5463455472126444)
    plan = reference.sinkhorn_plan(cost, 0.5)
    np.testing.assert_allclose((plan * cost).sum(), 2.157264294568961, rtol=1e-9)
    plan = reference.sinkhorn_plan(cost, 0.05)  # POT stalls here
    np.testing.assert_allclose((plan * cost).sum(), 1.926303037097157, rtol=1e-4)


def test_reference_roots_and_programmes_agree():
    cost = reference.squared_distances(X, Y)
    np.testing.assert_allclose(
        reference.linear_programme(cost), reference.exact(cost), rtol=1e-9
    )
    cov_x, cov_y = (reference.covariance(z) + 0.1 * np.eye(3) for z in (X, Y))
    np.testing.assert_allclose(
        reference.bures(cov_x, cov_y), reference.bures_sqrtm(cov_x, cov_y), rtol=1e-9
    )
    value = kddm_jax.bures(jnp.asarray(cov_x), jnp.asarray(cov_y))
    np.testing.assert_allclose(value, reference.bures(cov_x, cov_y), rtol=1e-9)
