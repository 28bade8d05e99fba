"""Distances as the text-books write them: NumPy and SciPy, float64, loops.

The witness that the library is compared with.  Nothing here shares code, or a
clever identity, with `kddm_jax`: optimal transport is a linear programme, classes
are a loop, square roots of matrices are SciPy's.  ``x`` is the student ``[n, d]``,
``y`` the teacher ``[m, d]``; Wasserstein distances are squared; covariances divide
by the number of samples.
"""

import numpy as np
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment, linprog
from scipy.signal import correlate2d
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
    """The beta of ``beta="max"``: max_ij ||x_i - y_j||^2."""
    return squared_distances(x, y).max()


# ---------------------------------------------------------------- transport


def exact(cost):
    """min <P, C> over plans with uniform marginals."""
    n, m = cost.shape
    if n == m:
        rows, columns = linear_sum_assignment(cost)
        return cost[rows, columns].mean()
    return linear_programme(cost)


def linear_programme(cost):
    """min <P, C>, P 1 = 1/n, P^T 1 = 1/m, P >= 0, as a linear programme."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones((1, m)))
    columns = np.kron(np.ones((1, n)), np.eye(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    solution = linprog(
        cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals, method="highs"
    )
    assert solution.status == 0, solution.message
    return solution.fun


def logsumexp(a, axis):
    top = a.max(axis, keepdims=True)
    return np.squeeze(top, axis) + np.log(np.exp(a - top).sum(axis))


def sinkhorn_plan(cost, epsilon, tolerance=1e-12):
    """P = a_i b_j exp((f_i + g_j - C_ij) / eps) with both marginals, uniform a, b.

    Sinkhorn's iterations, then Newton's on the dual: near a permutation the former
    need millions.
    """
    n, m = cost.shape
    log_a, log_b = np.full(n, -np.log(n)), np.full(m, -np.log(m))
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
        step *= min(1, 5 * epsilon / np.abs(step).max())  # exp stays of order one
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
    """The optimal cost between ``x`` and ``y`` under the function ``cost(x, y)``."""
    if solver == "exact":
        return exact(cost(x, y))
    if solver == "entropic":
        return entropic(cost(x, y), epsilon)
    return divergence(cost(x, y), cost(x, x), cost(y, y), epsilon)


# ------------------------------------------------------------------- classes


def classes(labels):
    """The classes present; negative labels are padding."""
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


def wasserstein(x, y, *, solver="exact", epsilon=None):
    """min_P sum_ij P_ij ||x_i - y_j||^2."""
    return solve(squared_distances, x, y, solver, epsilon)


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
    solver="exact",
    epsilon=None,
):
    """min_P sum_ij P_ij (||x_i - y_j||^2 + beta l(s_i, t_j))."""
    beta = largest_feature_cost(x, y) if beta == "max" else beta

    def cost(a, b):
        return joint_cost(a[0], b[0], a[1], b[1], beta=beta, label_cost=label_cost)

    return solve(cost, (x, logits_x), (y, logits_y), solver, epsilon)


def paired_l2(x, y):
    """(1/n) sum_i ||x_i - y_i||^2."""
    return ((x - y) ** 2).sum(1).mean()


# ------------------------------------------------------------------ Gaussians


def covariance(x):
    """(1/n) sum_i (x_i - mean)(x_i - mean)^T."""
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def root_by_eigenvectors(a):
    """V diag(sqrt(max(l, 0))) V^T: right for rank-deficient matrices too."""
    values, vectors = np.linalg.eigh((a + a.T) / 2)
    # the root of a round-off eigenvalue, 1e-16, would be 1e-8
    values[values < 1e-14 * values.max()] = 0
    return (vectors * np.sqrt(values)) @ vectors.T


def bures(cov_x, cov_y):
    """Tr(A + B - 2 (A^1/2 B A^1/2)^1/2)."""
    root = root_by_eigenvectors(cov_x)
    inner = root_by_eigenvectors(root @ cov_y @ root)
    return np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(inner)


def bures_sqrtm(cov_x, cov_y):
    """The same by SciPy's Schur method; for matrices of full rank."""
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
    """sum_c w_c of the above; a class of one sample has covariance zero."""

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
    """KL between Gaussians, ``ridge`` added to the variances of both."""
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
    """KL between the Gaussian fits of the two clouds."""
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
    """sum_c w_c KL_c; classes of one sample take each side's pooled covariance."""
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
    """The default bandwidth: mean entry of the matrices XX, YY and XY together."""
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
    """sum_c w_c MMD^2 of the class; by default one bandwidth, of same-class pairs."""
    if bandwidth is None:
        entries = []
        for c in classes(labels):
            a, b = x[labels == c], y[labels == c]
            for pair in ((a, a), (b, b), (a, b)):
                entries.append(np.sqrt(squared_distances(*pair)).ravel())
        bandwidth = np.concatenate(entries).mean()
    distance = lambda x, y: mmd(x, y, kernel=kernel, bandwidth=bandwidth)
    return class_loop(distance, x, y, labels, reduction)


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
    """Each channel of [b, h, w, c] with its own k x k kernel, (k - 1) / 2 zeros around.

    By SciPy, pixel by pixel; a stride leaves out pixels.
    """
    y = np.zeros_like(x)
    for image, channel in np.ndindex(x.shape[0], x.shape[3]):
        y[image, :, :, channel] = correlate2d(
            x[image, :, :, channel], kernel[:, :, 0, channel], mode="same"
        )
    return y[:, ::stride, ::stride]


def batch_norm(x, params, stats, train):
    """By the batch's mean and (biased) variance in training, else by running ones."""
    mean = x.mean((0, 1, 2)) if train else stats["mean"]
    var = x.var((0, 1, 2)) if train else stats["var"]
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def inverted_residual(x, params, stats, *, stride, train):
    """MobileNetV2's block, arXiv:1801.04381, table 1; layers by torchvision's names."""
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
    """Over the channels of each token."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]


def attention(x, params):
    """Softmax attention, arXiv:1706.03762, image by image and head by head."""
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
