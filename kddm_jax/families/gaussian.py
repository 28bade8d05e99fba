"""Computes Wasserstein distances between Gaussian fits of two samples of features.

``x`` are the student's features ``[n, d]``, ``y`` the teacher's ``[m, d]``; means and
covariances are those of the sample (``1/n``).  A batch often has fewer samples than
features, so that full covariances are singular.  The distance is therefore computed
from a nuclear norm, without the square root of a matrix.

References:
  Fernandes Montesuma, KD2M: a unifying framework for feature knowledge
  distillation, 2025 (arXiv 2504.01757).
"""

import jax
import jax.numpy as jnp

from kddm_jax.numerics import masks
from kddm_jax.numerics.bank import across, check_no_weights, own_classes
from kddm_jax.numerics.bures import class_bures
from kddm_jax.numerics.checks import as_float, as_released, check_choice, check_pair
from kddm_jax.numerics.classes import class_means, labelled_pair
from kddm_jax.numerics.linalg import (
    METHODS,
    cross_nuclear_norm,
    matmul,
    nuclear_norm,
    safe_sqrt,
    sqrtm_psd,
)

COVARIANCES = ("full", "diag")


def gaussian_wasserstein(
    x: jax.Array,
    y: jax.Array,
    *,
    covariance: str = "full",
    method: str = "auto",
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the squared Wasserstein distance between two fitted Gaussians, W2(G).

    .. math:: \|\mu_x - \mu_y\|^2 + \mathrm{Tr}\,S_x + \mathrm{Tr}\,S_y
              - 2\,\mathrm{Tr}\,(S_x^{1/2} S_y S_x^{1/2})^{1/2}, \quad
              \mathrm{Tr}\,(\cdot)^{1/2} = \|X_c Y_c^\top\|_* / \sqrt{nm}

    The second identity avoids the square root of a matrix.  It is also exact for
    rank-deficient covariances (``n < d``), where its derivative is finite.

    Cost: n² d + n³.  If d < n (d < n / 2 with "newton_schulz"), n d² + d³.  With
    "diag", n d.  Gradient: exact; at zero singular values, where it is not unique, it
    is the subgradient of minimal norm.  Not for: samples with equal means and
    covariances, which it cannot distinguish (use `wasserstein`), or keeping classes
    apart (use `class_gaussian_wasserstein`).

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features, shape ``[m, d]``.
      covariance: ``"full"``, or ``"diag"`` as in the released code, which computes
        ``||mu_x - mu_y||^2 + ||sigma_x - sigma_y||^2``.  Both normalize covariances by
        ``1/n``.
      method: algorithm for the nuclear norm: ``"svd"``, ``"newton_schulz"``, or
        ``"auto"``, which chooses by platform; see `linalg.nuclear_norm`.
      compat: ``"released"`` reproduces the released code; it is the same as
        ``covariance="diag"``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples; a mask requires ``n = m``.

    Returns:
      Scalar: squared distance.

    Raises:
      ValueError: shapes or dtypes are wrong, or an option is unknown.

    References:
      Takatsu, Wasserstein geometry of Gaussian measures, 2011, equation 3.
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), Gaussian case.

    Examples:
      >>> x = jnp.array([[-1.0], [1.0]])  # mean 0, variance 1
      >>> gaussian_wasserstein(x, 3 * x + 2)  # 2^2 + (1 - 3)^2
      Array(8., dtype=float32)
    """
    check_choice("covariance", covariance, COVARIANCES)
    (covariance,) = as_released(compat, covariance=(covariance, "full", "diag"))
    x, y = check_pair(x, y, same_rows=mask is not None)
    mask = masks.check_mask(mask, x.shape[0])
    mean_x, mean_y = masks.mean(x, mask), masks.mean(y, mask)
    x, y = masks.zeroed(mask, x - mean_x[None, :], y - mean_y[None, :])
    means = jnp.sum((mean_x - mean_y) ** 2)
    if covariance == "diag":
        variances_x, variances_y = masks.mean(x * x, mask), masks.mean(y * y, mask)
        return means + _squared_std_difference(variances_x, variances_y).sum()
    n, m = masks.size(mask, x), masks.size(mask, y)
    traces = jnp.sum(x * x) / n + jnp.sum(y * y) / m
    return means + traces - 2 * cross_nuclear_norm(x, y, method=method) / (n * m) ** 0.5


def _squared_std_difference(variances_x, variances_y):
    """Computes (sigma_x - sigma_y)^2, with a finite derivative at zero variance."""
    return (safe_sqrt(variances_x) - safe_sqrt(variances_y)) ** 2


def _to_bank(x, y, of, covariance, method):
    """Computes CW2(G) between a batch and a bank; see `class_gaussian_wasserstein`."""
    mean_x, mean_y = of.means(x, y)  # [k, d]
    means = jnp.sum(of.weights[:, None] * (mean_x - mean_y) ** 2)
    centered = x - matmul(of.of_x, mean_x), y - matmul(of.of_y, mean_y)
    if covariance == "diag":
        spread = _squared_std_difference(*of.means(*(z * z for z in centered)))
        return means + jnp.sum(of.weights[:, None] * spread)
    roots = [safe_sqrt(weights)[:, None] for weights in of.row_weights]
    x, y = (root * z for root, z in zip(roots, centered, strict=True))
    cross = matmul(of.of_x, of.of_y.T) * matmul(x, y.T)
    return (
        means + jnp.sum(x * x) + jnp.sum(y * y) - 2 * nuclear_norm(cross, method=method)
    )


def _has_few_classes(x, num_classes, covariance):
    """Returns whether problems of the classes are smaller than one of all samples."""
    if num_classes is None or jnp.ndim(x) != 2:
        return False
    n, d = jnp.shape(x)
    if covariance == "diag":
        return num_classes <= n
    # Above this, the classes took less time on a CPU for d = 32 to 512, k = 10 and 100.
    return n > d and n * n >= num_classes * d * d


def _to_own_classes(x, y, of, covariance, method):
    """Computes CW2(G) from sums over classes; see `class_gaussian_wasserstein`."""
    weights = of.weights[:, None]
    # A small difference of student and teacher is the mean of the differences.
    means = jnp.sum(weights * of.mean(x - y) ** 2)
    x, y = of.centered(x), of.centered(y)
    if covariance == "full":
        check_choice("method", method, METHODS)
        root = safe_sqrt(of.row_weights[0])[:, None]
        return means + class_bures(root * x, root * y, of.of_x, method)
    change = of.mean((x - y) * (x + y))  # of the variances
    total = safe_sqrt(of.mean(x * x)) + safe_sqrt(of.mean(y * y))
    change = jnp.where(total > 0, change / jnp.where(total > 0, total, 1), 0)
    return means + jnp.sum(weights * change**2)


def class_gaussian_wasserstein(
    x: jax.Array,
    y: jax.Array,
    labels: jax.Array,
    *,
    labels_y: jax.Array | None = None,
    weights_y: jax.Array | None = None,
    num_classes: int | None = None,
    covariance: str = "full",
    reduction: str = "mean",
    method: str = "auto",
    compat: str | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the class-conditional Gaussian Wasserstein distance, CW2(G).

    .. math:: \sum_c w_c W_2^2\big(N(\mu_{x|c}, S_{x|c}), N(\mu_{y|c}, S_{y|c})\big)

    One nuclear norm is enough for all classes.  The matrix of products, masked to pairs
    of the same class, is block-diagonal, so its nuclear norm is the sum over the
    blocks.

    With ``labels_y``, y are m features of other images, a `Bank`, such as one of stored
    moments (`numerics.bank.gaussian_bank`).  Classes without a row in y are left out.

    With ``num_classes``, a large batch takes one class after the other instead, which
    keeps the digits of the distance to a student that is close to its teacher.

    Cost: n² d + n³ for all classes together, or k (n d² + d³) with ``num_classes`` k if
    n > d and n² >= k d².  If diagonal, n² d, or n k d if k <= n.  With ``labels_y``,
    n m d + n² m, or m k d if diagonal.  Gradient: as in `gaussian_wasserstein`.
    Not for: more than about a thousand samples without ``num_classes``, because the
    matrix has shape ``[n, n]``.

    Args:
      x: student features, shape ``[n, d]``.
      y: teacher features of the same samples, shape ``[n, d]``; with ``labels_y``,
        of any samples, ``[m, d]``.
      labels: class labels, int, shape ``[n]``; negative labels have no weight.
      labels_y: class labels of y, int, shape ``[m]``; None uses ``labels``.
      weights_y: share of each row of y in its class, shape ``[m]``, not negative; only
        with ``labels_y``.  None weights the rows of a class alike.
      num_classes: number of classes k, needed with ``labels_y``; it makes large batches
        fast.  Labels must be less; one that is traced is not checked and may count as
        no label.
      covariance: ``"full"`` or ``"diag"``.
      reduction: ``"mean"`` averages over the classes present, ``"weighted"`` weights
        classes by their frequency, ``"sum"`` adds them up (as in the released code).
      method: algorithm of the nuclear norm, as in `gaussian_wasserstein`.
      compat: ``"released"`` is ``covariance="diag", reduction="sum"``.
      mask: shape ``[n]``; samples whose mask is zero are ignored, whatever their
        values.  None uses all samples.

    Returns:
      Scalar: squared distance.

    Raises:
      ValueError: shapes, dtypes or labels are wrong, or an option is unknown.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), class-conditional case.

    Examples:
      >>> x = jnp.array([[-1.0], [1.0], [0.0]])
      >>> y = jnp.array([[-3.0], [3.0], [4.0]])
      >>> class_gaussian_wasserstein(x, y, jnp.array([0, 0, 1]))  # (2^2 + 4^2) / 2
      Array(10., dtype=float32)
    """
    check_choice("covariance", covariance, COVARIANCES)
    covariance, reduction = as_released(
        compat,
        covariance=(covariance, "full", "diag"),
        reduction=(reduction, "mean", "sum"),
    )
    if labels_y is not None:
        x, y, of = across(
            *(x, y, labels),
            labels_y=labels_y,
            weights_y=weights_y,
            num_classes=num_classes,
            reduction=reduction,
            mask=mask,
        )
        return _to_bank(x, y, of, covariance, method)
    check_no_weights(weights_y)
    if _has_few_classes(x, num_classes, covariance):
        few = {"num_classes": num_classes, "reduction": reduction, "mask": mask}
        x, y, of = own_classes(x, y, labels, **few)
        return _to_own_classes(x, y, of, covariance, method)
    x, y, groups = labelled_pair(x, y, labels, num_classes, reduction, mask)
    mean_x, mean_y = class_means(x, groups), class_means(y, groups)
    weights = groups.weights[:, None]
    means = jnp.sum(weights * (mean_x - mean_y) ** 2)
    x, y = x - mean_x, y - mean_y
    if covariance == "diag":
        variances_x, variances_y = (class_means(z * z, groups) for z in (x, y))
        spread = _squared_std_difference(variances_x, variances_y)
        return means + jnp.sum(weights * spread)
    # weights_i = w_c / n_c for each sample of class c, so sqrt(weights) on both sides
    # gives each block its factor w_c / n_c.  Samples without a label become zero.
    root = safe_sqrt(weights)
    x, y = root * x, root * y
    traces = jnp.sum(x * x) + jnp.sum(y * y)
    cross = groups.same * matmul(x, y.T)
    return means + traces - 2 * nuclear_norm(cross, method=method)


def bures(cov_x: jax.Array, cov_y: jax.Array, *, method: str = "auto") -> jax.Array:
    r"""Computes the squared Bures distance between two covariance matrices.

    .. math:: \mathrm{Tr}\,A + \mathrm{Tr}\,B
              - 2\,\mathrm{Tr}\,(A^{1/2} B A^{1/2})^{1/2}
              = \mathrm{Tr}\,A + \mathrm{Tr}\,B - 2\,\|A^{1/2} B^{1/2}\|_*

    For samples, `gaussian_wasserstein` is faster and, in float32 with ``n < d``, more
    accurate: here the square roots of eigenvalues from round-off add 0.4 to 0.9 %.

    Cost: d³.  Gradient: that of the value, finite at repeated and zero eigenvalues; it
    is zero along the common null space.  Not for: samples.

    Args:
      cov_x: symmetric positive semi-definite matrix, shape ``[d, d]``.
      cov_y: symmetric positive semi-definite matrix, shape ``[d, d]``.
      method: algorithm of the nuclear norm, as in `gaussian_wasserstein`; the square
        roots are always computed by eigh.

    Returns:
      Scalar: squared distance.

    Raises:
      ValueError: shapes or dtypes are wrong, or ``method`` is unknown.

    References:
      Bhatia, Jain and Lim, On the Bures-Wasserstein distance between positive
      definite matrices, 2019, equation 1.

    Examples:
      >>> bures(jnp.diag(jnp.array([1.0, 4.0])), jnp.diag(jnp.array([9.0, 4.0])))
      Array(4., dtype=float32)
    """
    cov_x, cov_y = as_float("cov_x", cov_x), as_float("cov_y", cov_y)
    if cov_x.ndim != 2 or cov_x.shape != cov_x.shape[::-1]:
        raise ValueError(f"cov_x must have shape [d, d], got {list(cov_x.shape)}")
    if cov_y.shape != cov_x.shape:
        raise ValueError(
            f"cov_y must have the shape of cov_x, {list(cov_x.shape)}, "
            f"got {list(cov_y.shape)}"
        )
    roots = matmul(sqrtm_psd(cov_x), sqrtm_psd(cov_y))
    fidelity = nuclear_norm(roots, method=method)
    return jnp.trace(cov_x) + jnp.trace(cov_y) - 2 * fidelity
