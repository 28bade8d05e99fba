"""Compares nuclear norms, matrix square roots and distances with NumPy in float64."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from kddm_jax.numerics import linalg

pytestmark = pytest.mark.usefixtures("strict")

METHODS = ["svd", "newton_schulz"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_singular_values(values, n, m, seed=0):
    """Returns a random n x m matrix with these singular values, and its vectors."""
    u, _ = np.linalg.qr(normal(n, len(values), seed=seed))
    v, _ = np.linalg.qr(normal(m, len(values), seed=seed + 1))
    return (u * np.asarray(values)) @ v.T, u, v


def with_eigenvalues(values, seed=0):
    q, _ = np.linalg.qr(normal(len(values), len(values), seed=seed))
    return (q * np.asarray(values)) @ q.T, q


def isometry(matrix, cutoff):
    """Returns U_r V_r^T for the singular values above ``cutoff`` times the largest."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    keep = s > cutoff * s[0]
    return u[:, keep] @ vt[keep]


def check_derivatives(fn, *arrays, eps=1e-4, rtol=1e-5):
    """Compares forward and reverse mode with central differences; compiles once."""
    arrays = tuple(jnp.asarray(a) for a in arrays)
    check_grads(jax.jit(fn), arrays, 1, ("fwd", "rev"), eps=eps, rtol=rtol)


def value_and_gradients(fn, *arrays):
    argnums = tuple(range(len(arrays)))
    return jax.jit(jax.value_and_grad(fn, argnums))(*map(jnp.asarray, arrays))


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# -------------------------------------------------------------- nuclear norm


@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 3), (1, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_nuclear_norm_value_and_derivative(shape, method, x64):
    matrix = normal(*shape)
    norm = lambda m: linalg.nuclear_norm(m, method=method)
    value, (gradient,) = value_and_gradients(norm, matrix)
    # Newton-Schulz has an error of 1e-6 after 36 steps with these condition numbers.
    rtol = 1e-12 if method == "svd" else 1e-6
    np.testing.assert_allclose(value, np.linalg.norm(matrix, "nuc"), rtol=rtol)
    np.testing.assert_allclose(gradient, isometry(matrix, 1e-9), atol=100 * rtol)
    if method == "svd":
        check_derivatives(norm, matrix)


@pytest.mark.parametrize(
    "values",
    [(2.0, 2.0, 2.0, 2.0), (3.0, 1.0, 1.0, 1e-3), (1.0, 0.5, 1e-4, 1e-4)],
    ids=["all equal", "repeated", "tiny and repeated"],
)
def test_nuclear_norm_derivative_at_repeated_singular_values(values, x64):
    matrix, u, v = with_singular_values(values, 4, 4)
    _, (gradient,) = value_and_gradients(linalg.nuclear_norm, matrix)
    np.testing.assert_allclose(gradient, u @ v.T, atol=1e-9)
    # The curvature is 1 / (s_i + s_j), so the step is far below the smallest value.
    check_derivatives(linalg.nuclear_norm, matrix, eps=1e-7)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_nuclear_norm_drops_null_directions(shape, x64):
    """At rank two, the gradient is the subgradient of least norm, U_r V_r^T."""
    matrix, u, v = with_singular_values((3.0, 1.0), *shape)
    _, (gradient,) = value_and_gradients(linalg.nuclear_norm, matrix)
    np.testing.assert_allclose(gradient, u @ v.T, atol=1e-12)
    # The norm is smooth within the row and column spaces.
    inside = lambda core: linalg.nuclear_norm(
        jnp.asarray(matrix) + linalg.matmul(linalg.matmul(u, core), v.T)
    )
    check_derivatives(inside, np.zeros((2, 2)))


@pytest.mark.parametrize(("smallest", "kept"), [(1e-4, True), (1e-9, False)])
def test_nuclear_norm_cutoff_in_float32(smallest, kept):
    matrix = jnp.diag(jnp.array([1.0, smallest], jnp.float32))
    gradient = jax.grad(linalg.nuclear_norm)(matrix)
    np.testing.assert_allclose(gradient, np.diag([1.0, float(kept)]), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nuclear_norm_of_dead_features_in_float32(method):
    """Dead rows and columns have no gradient; the rest has that of the live block."""
    live = normal(12, 12)
    matrix = np.zeros((20, 16))
    matrix[:12, :12] = live
    norm = lambda m: linalg.nuclear_norm(m, method=method)
    value, (gradient,) = value_and_gradients(norm, np.float32(matrix))
    np.testing.assert_allclose(value, np.linalg.norm(live, "nuc"), rtol=1e-5)
    np.testing.assert_allclose(gradient[12:], 0, atol=1e-6)
    np.testing.assert_allclose(gradient[:, 12:], 0, atol=1e-6)
    assert relative(gradient[:12, :12], isometry(live, 1e-9)) < 4e-4


@pytest.mark.parametrize("method", METHODS)
def test_nuclear_norm_is_homogeneous(method):
    base = jnp.float32(normal(3, 4))
    fn = jax.jit(jax.value_and_grad(lambda m: linalg.nuclear_norm(m, method=method)))
    value, gradient = fn(base)
    for scale in (1e-25, 1e-12, 1e12, 1e25):
        scaled, scaled_gradient = fn(scale * base)
        np.testing.assert_allclose(scaled, scale * value, rtol=1e-5)
        np.testing.assert_allclose(scaled_gradient, gradient, atol=1e-5)
    nothing, none = fn(0 * base)
    assert nothing == 0
    np.testing.assert_array_equal(none, np.zeros((3, 4)))


# The docstring states these relative errors. In "aligned" the student is close to the
# teacher, in "classes" the scales of blocks differ by a factor of thirty.
@pytest.mark.parametrize(("inputs", "bound"), [("aligned", 4e-4), ("classes", 5e-3)])
def test_newton_schulz_keeps_its_stated_error(inputs, bound):
    n, d = 64, 256
    x = normal(n, d)
    y = x + 0.1 * normal(n, d, seed=1)
    if inputs == "classes":
        x, y = (z * np.repeat([1.0, 30.0], n // 2)[:, None] for z in (x, y))
        same = np.kron(np.eye(2), np.ones((n // 2, n // 2)))
    else:
        same = np.ones((n, n))
    matrix = same * (x @ y.T)
    norm = lambda m: linalg.nuclear_norm(m, method="newton_schulz")
    value, (gradient,) = value_and_gradients(norm, np.float32(matrix))
    np.testing.assert_allclose(value, np.linalg.norm(matrix, "nuc"), rtol=bound)
    assert relative(gradient, isometry(matrix, 1e-12)) < bound


@pytest.mark.parametrize("method", METHODS)
def test_nuclear_norm_vmaps_and_jits(method):
    stack = jnp.float32(normal(3, 4, 5))
    one = jax.jit(jax.value_and_grad(lambda m: linalg.nuclear_norm(m, method=method)))
    together = jax.jit(jax.vmap(one))(stack)
    apart = [one(m) for m in stack]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    chex.assert_trees_all_close(together, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------ the method by platform


def lowered(fn, platform, *arrays):
    """Returns the program that the compiler of a platform gets."""
    fn = jax.jit(jax.value_and_grad(fn))
    return fn.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def decompositions(text):
    """Returns a program's decompositions: LAPACK, cuSOLVER or functions."""
    known = {"svd": r"gesdd|gesvd|@svd|svd", "qr": r"geqrf|@Qr|@qr"}
    return {name for name, pattern in known.items() if re.search(pattern, text)}


NORMS = {
    "nuclear norm": (linalg.nuclear_norm, [(6, 5)]),
    "of a product": (linalg.cross_nuclear_norm, [(6, 5), (6, 5)]),
    "of a tall product": (linalg.cross_nuclear_norm, [(16, 5), (11, 5)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_auto_on_a_cpu_is_the_svd(name, dtype):
    norm, shapes = NORMS[name]
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(normal(*s, seed=i), dtype) for i, s in enumerate(shapes)]
        found, expected = (
            (
                jax.jit(partial(norm, **options))(*arrays),
                value_and_gradients(partial(norm, **options), *arrays),
            )
            for options in ({}, {"method": "svd"})
        )
        chex.assert_trees_all_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_auto_on_accelerators_takes_products(name, platform):
    norm, shapes = NORMS[name]
    arrays = [jnp.float32(normal(*s)) for s in shapes]
    tall = {"qr"} if "tall" in name else set()
    assert decompositions(lowered(norm, platform, *arrays)) == tall
    assert "svd" in decompositions(lowered(norm, "cpu", *arrays))
    by_svd = partial(norm, method="svd")
    assert "svd" in decompositions(lowered(by_svd, platform, *arrays))


def test_auto_on_accelerators_is_exact_in_float64(x64):
    matrix = jnp.asarray(normal(6, 5))
    assert decompositions(lowered(linalg.nuclear_norm, "cuda", matrix)) == {"svd"}


# -------------------------------------------------- nuclear norm of a product


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 512), (64, 256), (256, 256), (300, 128)])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_a_student_of_low_rank(shape, method):
    """Except for three directions, the products in float32 are rounding errors."""
    n, d = shape
    x, y = normal(n, 3) @ normal(3, d, seed=1), np.maximum(normal(n, d, seed=2), 0)
    x, y = np.float32(x - x.mean(0)), np.float32(y - y.mean(0))
    norm = lambda x, y: linalg.cross_nuclear_norm(x, y, method=method)
    _, (gradient, _) = value_and_gradients(norm, x, y)
    x, y = np.float64(x), np.float64(y)
    assert relative(gradient, isometry(x @ y.T, 1e-6) @ y) < 4e-4


SHAPES = [(4, 4, 6), (6, 6, 4), (3, 7, 5), (7, 3, 5), (7, 9, 4), (1, 5, 3)]


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_cross_nuclear_norm_value_and_derivative(n, m, d, x64):
    x, y = normal(n, d), normal(m, d, seed=1)
    value, gradients = value_and_gradients(linalg.cross_nuclear_norm, x, y)
    product = x @ y.T
    polar = isometry(product, 1e-9)
    np.testing.assert_allclose(value, np.linalg.norm(product, "nuc"), rtol=1e-12)
    np.testing.assert_allclose(gradients[0], polar @ y, atol=1e-9)
    np.testing.assert_allclose(gradients[1], polar.T @ x, atol=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), SHAPES[:4])
def test_cross_nuclear_norm_derivative_is_that_of_its_value(n, m, d, x64):
    x, y = normal(n, d), normal(m, d, seed=1)
    check_derivatives(linalg.cross_nuclear_norm, x, y)


@pytest.mark.parametrize(("n", "d"), [(4, 6), (6, 4)])
def test_cross_nuclear_norm_derivative_at_repeated_singular_values(n, d, x64):
    q, _ = np.linalg.qr(normal(6, 4))
    x = q if n > d else q.T  # all nonzero singular values of x x^T are 1
    _, gradients = value_and_gradients(linalg.cross_nuclear_norm, x, x)
    np.testing.assert_allclose(gradients, (x, x), atol=1e-12)
    check_derivatives(linalg.cross_nuclear_norm, x, x)


@pytest.mark.parametrize("side", ["student", "both"])
def test_cross_nuclear_norm_with_dead_features(side, x64):
    """With fewer samples than live features, the norm is smooth, with a derivative."""
    x, y = normal(3, 8), normal(3, 8, seed=1)
    x[:, 5:] = 0
    if side == "both":
        y[:, 5:] = 0
    check_derivatives(linalg.cross_nuclear_norm, x, y)


@pytest.mark.parametrize("side", ["student", "both", "everywhere"])
def test_cross_nuclear_norm_with_dead_features_of_many_samples(side, x64):
    """With more samples than features, the norm has a kink and a least subgradient."""
    x, y = normal(9, 6), normal(9, 6, seed=1)
    x[:, 4:] = 0
    if side == "both":
        y[:, 4:] = 0
    if side == "everywhere":
        x[:] = 0
    _, gradients = value_and_gradients(linalg.cross_nuclear_norm, x, y)
    product = x @ y.T
    polar = isometry(product, 1e-9) if product.any() else np.zeros_like(product)
    np.testing.assert_allclose(gradients[0], polar @ y, atol=1e-10)
    np.testing.assert_allclose(gradients[1], polar.T @ x, atol=1e-10)


@pytest.mark.parametrize(("n", "d"), [(16, 48), (48, 16)])
def test_cross_nuclear_norm_of_a_collapsed_student_in_float32(n, d):
    """The gradient of a student of rank one contains no arbitrary directions."""
    x = np.outer(normal(n), normal(d, seed=1))
    y = normal(n, d, seed=2)
    _, (gradient, _) = value_and_gradients(
        linalg.cross_nuclear_norm, np.float32(x), np.float32(y)
    )
    assert relative(gradient, isometry(x @ y.T, 1e-9) @ y) < 1e-4


# Not tall; tall, but with products of side n; and reduced by QR.
@pytest.mark.parametrize(("n", "m"), [(10, 8), (30, 36), (50, 64)])
def test_cross_nuclear_norm_by_newton_schulz(n, m):
    x, y = normal(n, 20), normal(m, 20, seed=1)
    fn = lambda x, y: linalg.cross_nuclear_norm(x, y, method="newton_schulz")
    value, (gradient, _) = value_and_gradients(fn, np.float32(x), np.float32(y))
    product = x @ y.T
    np.testing.assert_allclose(value, np.linalg.norm(product, "nuc"), rtol=1e-5)
    assert relative(gradient, isometry(product, 1e-9) @ y) < 4e-4


def test_cross_nuclear_norm_vmaps_and_jits():
    x, y = jnp.float32(normal(3, 6, 4)), jnp.float32(normal(3, 5, 4, seed=1))
    one = jax.jit(jax.value_and_grad(linalg.cross_nuclear_norm, argnums=(0, 1)))
    together = jax.jit(jax.vmap(one))(x, y)
    apart = [one(*pair) for pair in zip(x, y, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    chex.assert_trees_all_close(together, expected, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------- square roots


EIGENVALUES = {
    "generic": (0.3, 1.0, 2.5, 4.0),
    "identity": (1.0, 1.0, 1.0, 1.0),
    "repeated": (2.0, 2.0, 5.0, 5.0),
    "tiny": (1e-10, 1e-6, 1.0, 3.0),
}


@pytest.mark.parametrize("name", EIGENVALUES)
def test_sqrtm_psd_value_and_derivative(name, x64):
    """The derivative solves R dR + dR R = dA, as computed by SciPy."""
    cov, _ = with_eigenvalues(EIGENVALUES[name])
    root = scipy.linalg.sqrtm(cov).real
    direction = normal(4, 4, seed=3)
    direction = direction + direction.T
    push = lambda a, da: jax.jvp(jax.jit(linalg.sqrtm_psd), (a,), (da,))
    value, tangent = push(jnp.asarray(cov), jnp.asarray(direction))
    np.testing.assert_allclose(value, root, atol=1e-9)
    expected = scipy.linalg.solve_sylvester(root, root, direction)
    # The smallest root, 1e-5, has an error of 1e-11, which is 1e-6 of its derivative.
    assert relative(tangent, expected) < (1e-5 if name == "tiny" else 1e-9)
    if name != "tiny":  # finite differences are too coarse for it
        check_derivatives(linalg.sqrtm_psd, cov)


@pytest.mark.parametrize("values", [(0.0, 0.0, 1.0, 4.0), (0.0, 0.0, 0.0, 0.0)])
def test_sqrtm_psd_at_zero_eigenvalues(values, x64):
    cov, q = with_eigenvalues(values)
    jacobian = jax.jit(jax.jacrev(linalg.sqrtm_psd))(jnp.asarray(cov))
    chex.assert_tree_all_finite(jacobian)
    forward = jax.jit(jax.jacfwd(linalg.sqrtm_psd))(jnp.asarray(cov))
    np.testing.assert_allclose(jacobian, forward, atol=1e-8)
    null, live = q[:, :2], q[:, 2:]
    push = lambda d: np.einsum("ijkl,kl->ij", jacobian, d)
    np.testing.assert_allclose(push(null @ null.T), 0, atol=1e-6)
    if any(values):
        root = q * np.sqrt(values) @ q.T
        for direction in (live @ live.T, live @ null.T + null @ live.T):
            tangent = push(direction)
            np.testing.assert_allclose(
                root @ tangent + tangent @ root, direction, atol=1e-6
            )


def test_sqrtm_psd_in_float32():
    x = normal(5, 12)
    cov = x.T @ x  # rank 5 with 12 features
    root = np.asarray(jax.jit(linalg.sqrtm_psd)(jnp.float32(cov)))
    np.testing.assert_allclose(root @ root, cov, atol=1e-4)
    np.testing.assert_allclose(root, root.T, atol=1e-5)
    trace = lambda c: jnp.trace(linalg.sqrtm_psd(c))
    _, (gradient,) = value_and_gradients(trace, np.float32(cov))
    # On the range, d Tr R = Tr(R^+ dA) / 2.
    expected = scipy.linalg.pinvh(scipy.linalg.sqrtm(cov).real, rtol=1e-3) / 2
    assert relative(gradient, expected) < 1e-3


def test_sqrtm_psd_symmetrises_and_clips(x64):
    cov, _ = with_eigenvalues((0.5, 1.0, 2.0))
    skewed = cov + 0.1 * np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 0]])
    fn = jax.jit(linalg.sqrtm_psd)
    np.testing.assert_allclose(fn(skewed), fn(cov), atol=1e-12)
    negative, q = with_eigenvalues((-1e-9, 1.0, 4.0))
    root = fn(negative)
    np.testing.assert_allclose(root, (q * [0, 1, 2]) @ q.T, atol=1e-9)


def test_sqrtm_psd_vmaps_and_jits():
    stack = jnp.stack([jnp.float32(with_eigenvalues(v)[0]) for v in [(1, 2), (3, 3)]])
    one = jax.jit(jax.jacrev(linalg.sqrtm_psd))
    together = jax.vmap(one)(stack)
    apart = jnp.stack([one(c) for c in stack])
    chex.assert_trees_all_close(together, apart, atol=1e-5)


# -------------------------------------------------------------------- distances


def test_squared_distances(x64):
    x, y = normal(5, 3), normal(4, 3, seed=1)
    expected = ((x[:, None] - y[None]) ** 2).sum(-1)
    costs = jax.jit(linalg.squared_distances)(x, y)
    np.testing.assert_allclose(costs, expected, rtol=1e-12, atol=1e-12)
    check_derivatives(linalg.squared_distances, x, y)


def test_squared_distances_far_from_the_origin():
    """The shift keeps digits that ||x||^2 + ||y||^2 - 2 x.y would lose."""
    x, y = normal(6, 3), normal(4, 3, seed=1)
    offset = 1e4
    far = linalg.squared_distances(jnp.float32(x + offset), jnp.float32(y + offset))
    rounded = (np.float32(z + offset).astype(float) for z in (x, y))
    rounded_x, rounded_y = rounded
    expected = ((rounded_x[:, None] - rounded_y[None]) ** 2).sum(-1)
    np.testing.assert_allclose(far, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------- constant, safe_sqrt


def test_constant_has_a_zero_derivative_in_both_modes(x64):
    x = jnp.array([1.0, -2.0])
    square = lambda x: jnp.sum(linalg.constant(x) * x)
    chex.assert_trees_all_equal(jax.grad(square)(x), x)
    _, tangent = jax.jvp(square, (x,), (jnp.ones(2),))
    assert tangent == -1
    _, tangent = jax.jvp(jax.jit(linalg.constant), (x,), (jnp.ones(2),))
    chex.assert_trees_all_equal(tangent, jnp.zeros(2))
    chex.assert_trees_all_equal(jax.vmap(jax.grad(square))(x[:, None]), x[:, None])


def test_safe_sqrt(x64):
    x = jnp.array([-1.0, 0.0, 1e-30, 4.0])
    np.testing.assert_allclose(linalg.safe_sqrt(x), [0, 0, 1e-15, 2], rtol=1e-15)
    slope = jax.vmap(jax.jit(jax.grad(linalg.safe_sqrt)))(x)
    np.testing.assert_allclose(slope, [0, 0, 5e14, 0.25], rtol=1e-12)
    x = jnp.array([-1.0, 0.0, 0.25, 4.0])
    curvature = jax.vmap(jax.grad(jax.grad(linalg.safe_sqrt)))(x)
    np.testing.assert_allclose(curvature, [0, 0, -2, -1 / 32], rtol=1e-12)


def test_matmul_keeps_full_precision():
    jaxpr = jax.make_jaxpr(linalg.matmul)(jnp.ones((2, 3)), jnp.ones((3, 2)))
    (product,) = (e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general")
    assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


# -------------------------------------------------------------------- messages


X = jnp.ones((4, 3))
MESSAGES = {
    "method": (lambda: linalg.nuclear_norm(X, method="lu"), "'svd'.*'lu'"),
    "vector": (lambda: linalg.nuclear_norm(X[0]), r"\[n, m\].*\[3\].*vmap"),
    "widths": (lambda: linalg.cross_nuclear_norm(X, X.T), r"\[4, 3\] and \[3, 4\]"),
    "cross method": (lambda: linalg.cross_nuclear_norm(X, X, method=""), "method"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    call, message = MESSAGES[name]
    with pytest.raises(ValueError, match=message):
        call()
