"""Computes distances as textbooks define them: NumPy and SciPy, float64, loops.

The library is compared with these functions. They share no code and no clever identity
with `kddm_jax`: optimal transport is a linear programme, classes are a loop, and square
roots of matrices are SciPy's. ``x`` is the student ``[n, d]``, ``y`` the teacher ``[m,
d]``. Wasserstein distances are squared, and covariances divide by the number of
samples.
"""

import numpy as np
from scipy.fft import dctn
from scipy.linalg import orthogonal_procrustes, sqrtm
from scipy.optimize import linear_sum_assignment, linprog
from scipy.signal import correlate2d
from scipy.spatial.distance import cdist
from scipy.special import erf

# --------------------------------------------------------------------- costs


def squared_distances(x, y):
    """C_ij = sum_k (x_ik - y_jk)^2."""
    return ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def softmax(logits):
    """p_k = exp(l_k) / sum_k exp(l_k)."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def pairwise_kl(logits_x, logits_y):
    """C_ij = sum_k p_ik log(p_ik / q_jk), p student and q teacher."""
    p, q = softmax(logits_x), softmax(logits_y)
    ratio = np.log(p)[:, None, :] - np.log(q)[None, :, :]
    return (p[:, None, :] * ratio).sum(-1)


LABEL_COSTS = {
    "probs": lambda s, t: squared_distances(softmax(s), softmax(t)),
    "logits": squared_distances,
    "kl": pairwise_kl,
}


def joint_cost(x, y, logits_x, logits_y, *, beta, label_cost):
    """C_ij = ||x_i - y_j||^2 + beta l(s_i, t_j)."""
    features = squared_distances(x, y)
    return features + beta * LABEL_COSTS[label_cost](logits_x, logits_y)


def largest_feature_cost(x, y):
    """The largest feature cost, which ``beta="max"`` uses: max_ij ||x_i - y_j||^2."""
    return squared_distances(x, y).max()


# ---------------------------------------------------------------- transport


def uniform(n):
    return np.full(n, 1 / n)


def exact(cost):
    """min <P, C> over plans with uniform marginals."""
    n, m = cost.shape
    if n == m:
        rows, columns = linear_sum_assignment(cost)
        return cost[rows, columns].mean()
    return linear_programme(cost)


def linear_programme(cost, a=None, b=None):
    """min <P, C>, P 1 = a, P^T 1 = b, P >= 0, as a linear programme; uniform a, b."""
    n, m = cost.shape
    a, b = uniform(n) if a is None else a, uniform(m) if b is None else b
    rows = np.kron(np.eye(n), np.ones((1, m)))
    columns = np.kron(np.ones((1, n)), np.eye(m))
    marginals = np.concatenate([a, b])
    solution = linprog(
        cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals, method="highs"
    )
    assert solution.status == 0, solution.message
    return solution.fun


def logsumexp(a, axis):
    top = a.max(axis, keepdims=True)
    return np.squeeze(top, axis) + np.log(np.exp(a - top).sum(axis))


def sinkhorn_plan(cost, epsilon, a=None, b=None, tolerance=1e-12):
    """P = a_i b_j exp((f_i + g_j - C_ij) / eps) with marginals a, b, else uniform.

    Newton's method on the dual follows after Sinkhorn's iteration, which would need
    millions of steps if the plan is nearly a permutation.
    """
    n, m = cost.shape
    log_a = np.log(uniform(n) if a is None else a)
    log_b = np.log(uniform(m) if b is None else b)
    marginals = np.exp(np.concatenate([log_a, log_b]))
    g = np.zeros(m)
    for _ in range(1000):
        f = -epsilon * logsumexp(log_b + (g - cost) / epsilon, 1)
        g = -epsilon * logsumexp(log_a[:, None] + (f[:, None] - cost) / epsilon, 0)

    def plan_of(potentials):
        f, g = potentials[:n, None], potentials[n:]
        return np.exp(log_a[:, None] + log_b + (f + g - cost) / epsilon)

    def dual(potentials):
        return marginals @ potentials - epsilon * plan_of(potentials).sum()

    potentials = np.concatenate([f, g])
    for _ in range(200):
        plan = plan_of(potentials)
        rows, columns = plan.sum(1), plan.sum(0)
        residual = marginals - np.concatenate([rows, columns])
        if np.abs(residual).sum() < tolerance:
            return plan
        hessian = np.block([[np.diag(rows), plan], [plan.T, np.diag(columns)]])
        step = epsilon * np.linalg.lstsq(hessian, residual, rcond=1e-14)[0]
        step *= min(1, 5 * epsilon / np.abs(step).max())  # keeps exp of order one
        while dual(potentials + step) < dual(potentials) - 1e-14:
            step /= 2
        potentials = potentials + step
    raise AssertionError(f"marginals are off by {np.abs(residual).sum()}")


def entropic(cost, epsilon):
    """OT_eps = <P, C> + eps KL(P | a b^T) at the optimum."""
    n, m = cost.shape
    plan = sinkhorn_plan(cost, epsilon)
    positive = plan > 0
    relative = plan[positive] * np.log(plan[positive] * n * m)
    return (plan * cost).sum() + epsilon * relative.sum()


def divergence(cost_xy, cost_xx, cost_yy, epsilon):
    """S_eps = OT_eps(x, y) - (OT_eps(x, x) + OT_eps(y, y)) / 2."""
    within = entropic(cost_xx, epsilon) + entropic(cost_yy, epsilon)
    return entropic(cost_xy, epsilon) - within / 2


def solve(cost, x, y, solver, epsilon):
    """Returns the optimal cost between ``x`` and ``y`` for the costs ``cost(x, y)``."""
    if solver == "exact":
        return exact(cost(x, y))
    if solver == "entropic":
        return entropic(cost(x, y), epsilon)
    return divergence(cost(x, y), cost(x, x), cost(y, y), epsilon)


# ------------------------------------------------------------------- classes


def classes(labels):
    """Returns the classes that have samples; negative labels are no class."""
    return np.unique(labels[labels >= 0])


def class_weights(labels, reduction):
    """w_c: 1/k over the k classes present, n_c/n, or 1."""
    counts = np.array([(labels == c).sum() for c in classes(labels)], float)
    return {
        "mean": np.ones_like(counts) / len(counts),
        "weighted": counts / counts.sum(),
        "sum": np.ones_like(counts),
    }[reduction]


def class_loop(distance, x, y, labels, reduction):
    """sum_c w_c D(x of class c, y of class c)."""
    values = [distance(x[labels == c], y[labels == c]) for c in classes(labels)]
    return float(class_weights(labels, reduction) @ np.array(values))


# -------------------------------------------------------- empirical measures


def wasserstein(x, y, *, pairing=0.0, solver="exact", epsilon=None):
    """min_P sum_ij P_ij (||x_i - y_j||^2 + pairing [i != j])."""

    def cost(a, b):
        strangers = a[1][:, None] != b[1][None, :]
        return squared_distances(a[0], b[0]) + pairing * strangers

    if not pairing:
        return solve(squared_distances, x, y, solver, epsilon)
    index = np.arange(len(x))
    return solve(cost, (x, index), (y, index), solver, epsilon)


def class_wasserstein(x, y, labels, *, reduction="mean", solver="exact", epsilon=None):
    """sum_c w_c W2^2(x of class c, y of class c), one epsilon for all classes."""
    distance = lambda x, y: wasserstein(x, y, solver=solver, epsilon=epsilon)
    return class_loop(distance, x, y, labels, reduction)


def joint_wasserstein(
    x,
    y,
    logits_x,
    logits_y,
    *,
    beta="max",
    label_cost="probs",
    pairing=0.0,
    solver="exact",
    epsilon=None,
):
    """min_P sum_ij P_ij (||x_i - y_j||^2 + beta l(s_i, t_j) + pairing [i != j])."""
    beta = largest_feature_cost(x, y) if beta == "max" else beta

    def cost(a, b):
        joint = joint_cost(a[0], b[0], a[1], b[1], beta=beta, label_cost=label_cost)
        return joint + pairing * (a[2][:, None] != b[2][None, :])

    sides = [(x, logits_x, np.arange(len(x))), (y, logits_y, np.arange(len(y)))]
    return solve(cost, *sides, solver, epsilon)


def paired_l2(x, y):
    """(1/n) sum_i ||x_i - y_i||^2."""
    return ((x - y) ** 2).sum(1).mean()


# ----------------------------------------- along directions, and within clouds


def sliced_wasserstein(x, y, directions):
    """The mean of W2^2 along the columns of ``directions``."""
    along = lambda z, direction: (z @ direction)[:, None]
    return np.mean([wasserstein(along(x, d), along(y, d)) for d in directions.T])


METRICS = {
    "euclidean": lambda x: cdist(x, x),
    "sqeuclidean": lambda x: cdist(x, x, "sqeuclidean"),
    "cosine": lambda x: cdist(x, x, "cosine"),
}


def gromov_energy(a, b, plan):
    """sum_ijkl (A_ik - B_jl)^2 P_ij P_kl."""
    differences = (a[:, None, :, None] - b[None, :, None, :]) ** 2  # i, j, k, l
    return np.einsum("ijkl,ij,kl->", differences, plan, plan)


def gromov_wasserstein(x, y, *, metric="euclidean", epsilon=None):
    """The least of the local minima that linearized problems lead to."""
    a, b = METRICS[metric](x), METRICS[metric](y)
    n, m = len(a), len(b)
    starts = [np.full((n, m), 1 / (n * m))]
    if epsilon is not None:
        plan, before = starts[0], 0
        while np.abs(plan - before).sum() > 1e-10:
            before, plan = plan, sinkhorn_plan(-4 * a @ plan @ b, epsilon)
        relative = (plan * np.log(plan * n * m)).sum()
        return gromov_energy(a, b, plan) + epsilon * relative
    if n == m:
        starts.append(np.eye(n) / n)
    values = []
    for plan in starts:
        energy, before = gromov_energy(a, b, plan), np.inf
        while energy < before - 1e-12:
            before, plan = energy, optimal_plan(-a @ plan @ b)
            energy = gromov_energy(a, b, plan)
        values.append(min(before, energy))
    return min(values)


def optimal_plan(cost):
    """Returns an extreme plan with uniform marginals, by a linear programme."""
    n, m = cost.shape
    marginals = np.concatenate([uniform(n), uniform(m)])
    rows = np.kron(np.eye(n), np.ones((1, m)))
    columns = np.kron(np.ones((1, n)), np.eye(m))
    solution = linprog(
        cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals, method="highs-ds"
    )
    return solution.x.reshape(n, m)


# ------------------------------------------------------------------ Gaussians


def covariance(x):
    """(1/n) sum_i (x_i - mean)(x_i - mean)^T."""
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def root_by_eigenvectors(a):
    """V diag(sqrt(max(l, 0))) V^T, also for rank-deficient matrices."""
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    # Without this, an eigenvalue of 1e-16 would become a root of 1e-8.
    values[values < 1e-14 * values.max()] = 0
    return (vectors * np.sqrt(values)) @ vectors.T


def bures(cov_x, cov_y):
    """Tr(A + B - 2 (A^1/2 B A^1/2)^1/2)."""
    root = root_by_eigenvectors(cov_x)
    inner = root_by_eigenvectors(root @ cov_y @ root)
    return np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(inner)


def bures_sqrtm(cov_x, cov_y):
    """The same by SciPy's Schur method, for matrices of full rank."""
    root = sqrtm(cov_x)
    inner = sqrtm(root @ cov_y @ root)
    return np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(inner).real


def has_full_rank(cov):
    values = np.linalg.eigvalsh(cov)
    return values[0] > 1e-6 * values[-1]


def gaussian_wasserstein(x, y, *, covariance_type="full"):
    """||mx - my||^2 + Bures(Sx, Sy); "diag": + sum_k (sx_k - sy_k)^2."""
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    if covariance_type == "diag":
        return means + ((x.std(0) - y.std(0)) ** 2).sum()
    cov_x, cov_y = covariance(x), covariance(y)
    both = bures_sqrtm if has_full_rank(cov_x) and has_full_rank(cov_y) else bures
    return means + both(cov_x, cov_y)


def class_gaussian_wasserstein(
    x, y, labels, *, covariance_type="full", reduction="mean"
):
    """sum_c w_c of the above; the covariance of a class of one sample is zero."""

    def distance(x, y):
        return gaussian_wasserstein(x, y, covariance_type=covariance_type)

    return class_loop(distance, x, y, labels, reduction)


def kl_of_moments(mean_p, cov_p, mean_q, cov_q):
    """KL(P || Q) = (Tr(Q^-1 P) + dm^T Q^-1 dm - d + log(det Q / det P)) / 2."""
    inverse, delta = np.linalg.inv(cov_q), mean_p - mean_q
    log_det = np.linalg.slogdet(cov_q)[1] - np.linalg.slogdet(cov_p)[1]
    quadratic = np.trace(inverse @ cov_p) + delta @ inverse @ delta
    return 0.5 * (quadratic - len(delta) + log_det)


def kl_of_variances(mean_p, var_p, mean_q, var_q):
    """The same for diagonal covariances, feature by feature."""
    ratio, delta = var_p / var_q, mean_p - mean_q
    return 0.5 * (ratio + delta**2 / var_q - 1 - np.log(ratio)).sum()


def moments(x, covariance_type):
    spread = covariance(x) if covariance_type == "full" else x.var(0)
    return x.mean(0), spread


def ridged_kl(moments_x, moments_y, *, ridge, direction):
    """KL between Gaussians, with ``ridge`` added to the variances of both."""
    (mean_x, cov_x), (mean_y, cov_y) = moments_x, moments_y
    full = cov_x.ndim == 2
    shift = ridge * np.eye(len(mean_x)) if full else ridge
    student, teacher = (mean_x, cov_x + shift), (mean_y, cov_y + shift)
    kl = kl_of_moments if full else kl_of_variances
    if direction == "student||teacher":
        return kl(*student, *teacher)
    return kl(*teacher, *student)


def gaussian_kl(
    x, y, *, covariance_type="diag", ridge=0.0, direction="student||teacher"
):
    """KL between Gaussians fitted to the two samples."""
    return ridged_kl(
        moments(x, covariance_type),
        moments(y, covariance_type),
        ridge=ridge,
        direction=direction,
    )


def pooled_within(x, labels, covariance_type):
    """(1/n) sum_c sum_{i in c} (x_i - m_c)(x_i - m_c)^T, classes of two or more."""
    of_class = [x[labels == c] for c in classes(labels)]
    centred = np.concatenate([z - z.mean(0) for z in of_class if len(z) > 1] or [0 * x])
    scatter = centred.T @ centred / len(centred)
    return scatter if covariance_type == "full" else np.diag(scatter)


def class_gaussian_kl(
    x,
    y,
    labels,
    *,
    covariance_type="diag",
    ridge=0.0,
    direction="student||teacher",
    reduction="mean",
):
    """sum_c w_c KL_c; a class of one sample has the pooled covariance of its side."""
    values = []
    for c in classes(labels):
        of_class = []
        for z in (x, y):
            mean, spread = moments(z[labels == c], covariance_type)
            if (labels == c).sum() < 2:
                spread = pooled_within(z, labels, covariance_type)
            of_class.append((mean, spread))
        values.append(ridged_kl(*of_class, ridge=ridge, direction=direction))
    return float(class_weights(labels, reduction) @ np.array(values))


# ------------------------------------------------------------------- kernels


def mean_distance(x, y):
    """The default bandwidth: the mean entry of the matrices XX, YY and XY together."""
    pairs = [(x, x), (y, y), (x, y)]
    entries = [np.sqrt(squared_distances(a, b)).ravel() for a, b in pairs]
    return np.concatenate(entries).mean()


def mmd(x, y, *, kernel="rbf", bandwidth=None):
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y), diagonals included."""
    if kernel == "linear":
        k = lambda a, b: a @ b.T
    else:
        sigma = mean_distance(x, y) if bandwidth is None else bandwidth
        k = lambda a, b: np.exp(-squared_distances(a, b) / (2 * sigma**2))
    return k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()


def class_mmd(x, y, labels, *, kernel="rbf", bandwidth=None, reduction="mean"):
    """sum_c w_c MMD^2 of class c; the default bandwidth is of all same-class pairs."""
    if bandwidth is None:
        entries = []
        for c in classes(labels):
            a, b = x[labels == c], y[labels == c]
            for pair in ((a, a), (b, b), (a, b)):
                entries.append(np.sqrt(squared_distances(*pair)).ravel())
        bandwidth = np.concatenate(entries).mean()
    distance = lambda x, y: mmd(x, y, kernel=kernel, bandwidth=bandwidth)
    return class_loop(distance, x, y, labels, reduction)


# ------------------------------------------------------------------ alignment


def normalized(x):
    """Centres features and divides them by their Frobenius norm."""
    centred = x - x.mean(0)
    return centred / np.linalg.norm(centred)


def procrustes(x, y, *, unit_norm=True):
    """min_Q ||x - y Q||^2 by SciPy; the narrower side is padded with zeros."""
    x, y = (normalized(x), normalized(y)) if unit_norm else (x, y)
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(z, [(0, 0), (0, width - z.shape[1])]) for z in (x, y))
    rotation, _ = orthogonal_procrustes(y, x)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(width), atol=1e-9)
    return ((x - y @ rotation) ** 2).sum()


def feature_gram(x, y, *, unit_norm=True):
    """sum_ij (<x_i, x_j> - <y_i, y_j>)^2."""
    x, y = (normalized(x), normalized(y)) if unit_norm else (x, y)
    inner = lambda z: np.array([[a @ b for b in z] for a in z])
    return ((inner(x) - inner(y)) ** 2).sum()


def hsic(k, l):
    """Tr(K H L H), where H centres, up to a factor."""
    centring = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ centring @ l @ centring)


def hsic_debiased(k, l):
    """Song et al., equation 5, up to a factor."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    return (
        np.trace(k @ l)
        + k.sum() * l.sum() / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (k @ l).sum()
    )


def cka(x, y, *, debiased=False):
    """1 - HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    measure = hsic_debiased if debiased else hsic
    k, l = x @ x.T, y @ y.T
    return 1 - measure(k, l) / np.sqrt(measure(k, k) * measure(l, l))


def linear_projection(x, y):
    """min_W mean (x W - y)^2."""
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    return ((x @ weights - y) ** 2).mean()


def similarity_preserving(x, y):
    """||G_x - G_y||^2 / n^2, where G is x x^T with its rows divided by their norms."""
    rows = lambda g: g / np.linalg.norm(g, axis=1)[:, None]
    return ((rows(x @ x.T) - rows(y @ y.T)) ** 2).mean()


def cosine(a, b):
    """<a, b> / (|a| |b|), and 0 if a vector is zero."""
    lengths = np.sqrt(a @ a) * np.sqrt(b @ b)
    return a @ b / lengths if lengths else 0.0


def pkt(x, y):
    """Mean over i of KL(p_i || q_i), where p_i(j) is proportional to (1 + cos) / 2."""
    total = 0.0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        q, p = (
            np.array([(1 + cosine(z[i], z[j])) / 2 for j in others]) for z in (x, y)
        )
        total += discrete_kl(p / p.sum(), q / q.sum())
    return total / len(x)


def huber(a):
    """a^2 / 2 up to 1, then |a| - 1/2."""
    return a**2 / 2 if abs(a) <= 1 else abs(a) - 0.5


def rkd_distance(x, y):
    """Mean over pairs of huber(|x_i - x_j| / mean - |y_i - y_j| / mean)."""
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    s, t = (np.array([np.linalg.norm(z[i] - z[j]) for i, j in pairs]) for z in (x, y))
    return np.mean(
        [huber(a - b) for a, b in zip(s / s.mean(), t / t.mean(), strict=True)]
    )


def rkd_angle(x, y):
    """Mean over triples of huber(cos at x_j - cos at y_j)."""
    n, values = range(len(x)), []
    for i, j, k in ((i, j, k) for i in n for j in n for k in n):
        if len({i, j, k}) == 3:
            s, t = (cosine(z[i] - z[j], z[k] - z[j]) for z in (x, y))
            values.append(huber(s - t))
    return np.mean(values)


def contrastive(x, y, *, temperature=0.07):
    """Mean over i of -log of the softmax of cos(x_i, y_j) / T at j = i."""
    cosines = np.array([[cosine(a, b) for b in y] for a in x])
    return -np.log(np.diag(softmax(cosines / temperature))).mean()


def kdpp(x, y, labels, class_means):
    """Mean over labelled i of 1 - <x_i, m / |m|> / max(|x_i|, |y_i|)."""
    values = []
    for s, t, label in zip(x, y, labels, strict=True):
        if label >= 0:
            direction = class_means[label] / np.linalg.norm(class_means[label])
            values.append(1 - s @ direction / max(*map(np.linalg.norm, (s, t))))
    return np.mean(values)


def cells(size, count):
    """Returns the slices of adaptive cells."""
    return [
        slice(int(np.floor(k * size / count)), int(np.ceil((k + 1) * size / count)))
        for k in range(count)
    ]


def adaptive_pool(image, height, width):
    """Averages an image ``[h, w, c]`` over a grid of adaptive cells."""
    return np.array(
        [
            [
                image[rows, columns].mean((0, 1))
                for columns in cells(len(image[0]), width)
            ]
            for rows in cells(len(image), height)
        ]
    )


def nst(maps_x, maps_y, *, kernel="poly"):
    """Mean of k_xx + k_yy - 2 k_xy over the channels of an image, which have norm 1."""
    values = []
    for pair in zip(maps_x, maps_y, strict=True):
        size = np.minimum(pair[0].shape[:2], pair[1].shape[:2])
        channels = [adaptive_pool(image, *size) for image in pair]
        channels = [image.reshape(-1, image.shape[-1]).T for image in channels]
        f, g = (c / np.linalg.norm(c, axis=1)[:, None] for c in channels)
        squares = [squared_distances(a, b).ravel() for a, b in ((f, f), (g, g), (f, g))]
        variance = np.concatenate(squares).mean()
        k = {
            "poly": lambda a, b: (a @ b.T) ** 2,
            "linear": lambda a, b: a @ b.T,
            "rbf": lambda a, b, v=variance: np.exp(-squared_distances(a, b) / (2 * v)),
        }[kernel]
        values.append(k(f, f).mean() + k(g, g).mean() - 2 * k(f, g).mean())
    return np.mean(values)


def attention_maps(maps_x, maps_y, power):
    """Yields a pair of maps of norm 1, means over channels of |f|^power."""
    for pair in zip(maps_x, maps_y, strict=True):
        size = np.minimum(pair[0].shape[:2], pair[1].shape[:2])
        pair = [adaptive_pool(image, *size) for image in pair]
        pair = [(np.abs(image) ** power).mean(-1) for image in pair]
        yield [image / np.linalg.norm(image) for image in pair]


def attention_transfer(maps_x, maps_y, *, power=2):
    """Mean over images of the squared distance of the attention maps."""
    pairs = attention_maps(maps_x, maps_y, power)
    return np.mean([((a - b) ** 2).sum() for a, b in pairs])


def attention_dct(maps_x, maps_y, *, frequencies=None):
    """Mean over images of the squared distance of their cosine transforms."""
    values = []
    for pair in attention_maps(maps_x, maps_y, 2):
        a, b = (dctn(z, norm="ortho")[:frequencies, :frequencies] for z in pair)
        values.append(((a - b) ** 2).sum() - (a - b)[0, 0] ** 2)
    return np.mean(values)


def wkd_features(maps_x, maps_y, *, grid=1, ratio=2.0):
    """Sum over cells of ratio ||mean difference||^2 + ||deviation difference||^2."""
    total = 0.0
    for pair in zip(maps_x, maps_y, strict=True):
        moments = []
        for image in pair:
            parts = [
                image[rows, columns].reshape(-1, image.shape[-1])
                for rows in cells(image.shape[0], grid)
                for columns in cells(image.shape[1], grid)
            ]
            mean = np.array([part.mean(0) for part in parts])
            variance = np.array(
                [
                    part.var(0, ddof=1) if len(part) > 1 else 0 * part[0]
                    for part in parts
                ]
            )
            moments.append((mean, np.sqrt(variance + 1e-5)))
        (mean_x, std_x), (mean_y, std_y) = moments
        total += ratio * ((mean_x - mean_y) ** 2).sum() + ((std_x - std_y) ** 2).sum()
    return total / len(maps_x) / grid**2


# --------------------------------------------------------------- predictions


def discrete_kl(p, q):
    """sum_k p_k log(p_k / q_k)."""
    return (p * np.log(p / q)).sum(-1)


def kd(
    logits_x,
    logits_y,
    *,
    temperature=4.0,
    standardize=False,
    direction="teacher||student",
):
    """T^2 times the mean KL of predictions at temperature T."""
    if standardize:
        logits_x, logits_y = (
            (z - z.mean(1)[:, None]) / (z.std(1, ddof=1)[:, None] + 1e-6)
            for z in (logits_x, logits_y)
        )
    s, t = softmax(logits_x / temperature), softmax(logits_y / temperature)
    divergence = discrete_kl(t, s) if direction[0] == "t" else discrete_kl(s, t)
    return temperature**2 * divergence.mean()


def jsd(logits_x, logits_y, *, beta=0.5, temperature=1.0):
    """Mean of beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    p, q = softmax(logits_x / temperature), softmax(logits_y / temperature)
    m = beta * q + (1 - beta) * p
    return (beta * discrete_kl(q, m) + (1 - beta) * discrete_kl(p, m)).mean()


def dkd(logits_x, logits_y, labels, *, alpha=1.0, beta=8.0, temperature=4.0):
    """T^2 times the mean of alpha KL of (p, 1 - p) and beta KL among other classes."""
    values = []
    for s, t, label in zip(logits_x, logits_y, labels, strict=True):
        if label >= 0:
            p, q = softmax(s / temperature), softmax(t / temperature)
            pair_p, pair_q = (np.array([z[label], 1 - z[label]]) for z in (p, q))
            others_p, others_q = (np.delete(z, label) for z in (p, q))
            others_p, others_q = others_p / others_p.sum(), others_q / others_q.sum()
            target, other = discrete_kl(pair_q, pair_p), discrete_kl(others_q, others_p)
            values.append(alpha * target + beta * other)
    return temperature**2 * np.mean(values)


def dist(logits_x, logits_y, *, beta=1.0, gamma=1.0, temperature=1.0):
    """beta times the mean of 1 - correlation of rows, gamma times that of columns."""
    p, q = softmax(logits_x / temperature), softmax(logits_y / temperature)
    of = lambda a, b: np.mean(
        [1 - np.corrcoef(*z)[0, 1] for z in zip(a, b, strict=True)]
    )
    return beta * of(p, q) + gamma * of(p.T, q.T)


def unrolled_sinkhorn(cost, epsilon, a, b, iterations):
    """Iterates v = b / K^T u, u = a / K v, from u = 1/k."""
    kernel, u = np.exp(-cost / epsilon), np.full(len(a), 1 / len(a))
    for _ in range(iterations):
        v = b / (kernel.T @ u + 1e-8)
        u = a / (kernel @ v + 1e-8)
    return u[:, None] * kernel * v


def wkd_logits(
    logits_x,
    logits_y,
    labels,
    *,
    class_cost,
    temperature,
    gamma=1.0,
    epsilon=0.05,
    iterations=None,
):
    """Adds, for each image, KL of the label's class and transport of all others."""
    values = []
    for s, t, label in zip(logits_x, logits_y, labels, strict=True):
        if label < 0:
            continue
        others = np.delete(np.arange(len(s)), label)
        cost = class_cost[np.ix_(others, others)]
        p, q = (softmax(z[others] / temperature) for z in (s, t))
        plan = (
            sinkhorn_plan(cost, epsilon, p, q)
            if iterations is None
            else unrolled_sinkhorn(cost, epsilon, p, q, iterations)
        )
        target = -softmax(t)[label] * np.log(softmax(s)[label])
        values.append(target + gamma * (plan * cost).sum())
    return np.mean(values)


def class_cost_cka(features, *, kappa=1.0):
    """1 - exp(-kappa (1 - CKA)) of every pair of classes."""
    return np.array(
        [[1 - np.exp(-kappa * cka(a, b)) for b in features] for a in features]
    )


# ---------------------------------------------------------- knowledge quality


def knowledge_quality(features, labels, *, n_train, diagonal=False, log_const=None):
    """(S, I, E, Q) of arXiv:2511.14981, sample by sample."""
    groups = [features[labels == c] for c in classes(labels)]
    unit = lambda x: x / np.sqrt((x**2).sum())
    alignments = lambda x, y: np.array([[abs(unit(a) @ unit(b)) for b in y] for a in x])

    within, between, smallest, entropies, gaps = [], [], [], [], []
    for i, group in enumerate(groups):
        own = alignments(group, group)
        off = own[~np.eye(len(own), dtype=bool)]
        within.append((own if diagonal else off).mean())
        smallest.append(off.min())

        s = np.linalg.svd(group - group.mean(0), compute_uv=False)
        p = s**2 / (s**2).sum()
        p = p[p > 1e-14]
        h = -(p * np.log(p)).sum()
        entropies.append(h / np.log(log_const or len(group) - 1))

        others = [other for j, other in enumerate(groups) if j != i]
        between += [alignments(group, other).mean() for other in others]
        gaps.append(np.sqrt(squared_distances(group, np.concatenate(others)).min()))

    lengths = [np.mean([np.sqrt(a @ a) for a in group]) for group in groups]
    n, d = np.concatenate(groups).shape
    packing = (n_train / np.pi) ** (1 / min(n, d))
    separation = np.mean(within) - np.mean(between)
    information = (1 - np.mean(smallest)) * np.mean(entropies)
    efficiency = packing * 2 * np.mean(gaps) / np.mean(lengths)
    return (
        separation,
        information,
        efficiency,
        separation + np.sqrt(information * efficiency),
    )


# -------------------------------------------------------------------- networks


def depthwise(x, kernel, stride):
    """Convolves each channel of [b, h, w, c] with its own k x k kernel.

    By SciPy, pixel by pixel, with (k - 1) / 2 zeros around; a stride leaves out pixels.
    """
    y = np.zeros_like(x)
    for image, channel in np.ndindex(x.shape[0], x.shape[3]):
        y[image, :, :, channel] = correlate2d(
            x[image, :, :, channel], kernel[:, :, 0, channel], mode="same"
        )
    return y[:, ::stride, ::stride]


def convolve(x, kernel, stride):
    """Convolves `[b, h, w, c]` with (k - 1) / 2 zeros around, as a sum over taps."""
    size, pad = kernel.shape[0], (kernel.shape[0] - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    h, w = ((n + 2 * pad - size) // stride + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], h, w, kernel.shape[3]))
    for i in range(h):
        for j in range(w):
            a, b = i * stride, j * stride
            y[:, i, j] = np.tensordot(padded[:, a : a + size, b : b + size], kernel, 3)
    return y


def batch_norm(x, params, stats, train):
    """Uses the batch's mean and (biased) variance in training, else running ones."""
    mean = x.mean((0, 1, 2)) if train else stats["mean"]
    var = x.var((0, 1, 2)) if train else stats["var"]
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def inverted_residual(x, params, stats, *, stride, train):
    """MobileNetV2's block, arXiv:1801.04381, table 1, with torchvision's names."""
    relu6 = lambda x: np.clip(x, 0, 6)
    norm = lambda x, name: batch_norm(x, params[name], stats[name], train)
    y, names = x, ["conv_0_0", "conv_0_1", "conv_1", "conv_2"]
    if "conv_3" in params:
        names = ["conv_1_0", "conv_1_1", "conv_2", "conv_3"]
        y = relu6(norm(y @ params["conv_0_0"]["kernel"][0, 0], "conv_0_1"))
    convolve, convolve_norm, narrow, narrow_norm = names
    y = depthwise(y, params[convolve]["kernel"], stride)
    y = relu6(norm(y, convolve_norm))
    y = norm(y @ params[narrow]["kernel"][0, 0], narrow_norm)
    return x + y if x.shape == y.shape else y


def layer_norm(x, params):
    """Normalizes each token over its channels."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]


def attention(x, params):
    """Softmax attention, arXiv:1706.03762, for each image and head."""
    heads = params["query"]["kernel"].shape[1]
    y = np.zeros_like(x)
    for i in range(x.shape[0]):
        for h in range(heads):
            q, k, v = (
                x[i] @ params[name]["kernel"][:, h] + params[name]["bias"][h]
                for name in ("query", "key", "value")
            )
            weights = softmax(q @ k.T / np.sqrt(q.shape[-1]))
            y[i] += weights @ v @ params["out"]["kernel"][h]
    return y + params["out"]["bias"]


def encoder_block(x, params):
    """The transformer's block, arXiv:2010.11929, equations 2 and 3."""
    dense = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]
    x = x + attention(layer_norm(x, params["ln_1"]), params["self_attention"])
    y = dense(layer_norm(x, params["ln_2"]), "mlp_0")
    y = y * (1 + erf(y / np.sqrt(2))) / 2
    return x + dense(y, "mlp_3")
