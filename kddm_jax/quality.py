"""Rates the layers of a teacher by how useful they are for distillation.

Cooper et al., "Logit-Based Losses Limit the Effectiveness of Feature Knowledge
Distillation", arXiv:2511.14981, rate a layer by the geometry of its features. This
needs class labels but no training. The quality is `Q = S + sqrt(I E)`, where S is the
separation of the classes, I the information within them, and E the efficiency with
which they use space.

In formulas, `f_i` are the flattened features of sample i, `u_i = f_i / ||f_i||`, and
`G_ij = |<u_i, u_j>|`. Everything is computed from one `[n, n]` Gram matrix, which is a
sum over blocks of features. Hence features may be very wide, or on disk
(`numpy.memmap`).

`select_layers` chooses layers by Q, and `layer_similarity` finds layers that are copies
of each other. `kddm_jax.probe` measures how well a layer separates the classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kddm_jax.numerics.checks import as_float, check_number
from kddm_jax.numerics.linalg import matmul
from kddm_jax.numerics.samples import by_class, check_finite, flat_features

# The released code's options, for `knowledge_quality(f, y, **RELEASED)`.
RELEASED: Mapping[str, object] = MappingProxyType(
    {"include_diagonal": True, "log_const": 5.0}
)

# Largest number of values on the device at once, samples times features: 128 MB.
_BLOCK = 2**25


class KnowledgeQuality(NamedTuple):
    """Holds the quality of a layer, in the notation of arXiv:2511.14981.

    Attributes:
      S: separation, the alignment within classes minus that between classes, in
        [-1, 1].
      I: information, the spread of directions within a class, in [0, 1] unless
        `log_const` is given.
      E: efficiency, the distance between classes divided by the length of features,
        at least 0.
      Q: quality, `S + sqrt(I E)`.
      K: factor of E that depends on the size of the training set, `n_train`.
    """

    S: float
    I: float
    E: float
    Q: float
    K: float


class _Geometry(NamedTuple):
    """Holds the inner products and distances of samples, which are sorted by class."""

    cosines: np.ndarray  # |<u_i, u_j>|, [n, n]
    squares: np.ndarray  # ||f_i - f_j||^2, [n, n]
    centred: np.ndarray  # <f_i - mean, f_j - mean>, [n, n]
    norms: np.ndarray  # ||f_i||, [n]
    starts: np.ndarray  # index of the first sample of each class, [k]

    @property
    def classes(self) -> list[slice]:
        ends = [*self.starts[1:], len(self.norms)]
        return [slice(*pair) for pair in zip(self.starts, ends, strict=True)]


@jax.jit
def _add_block(total, block):
    """Adds a block of features to the Gram matrix, <f - mean, mean> and ||mean||^2."""
    gram, offset, square = total
    mean = jnp.mean(block, axis=0)
    block = block - mean[None, :]
    return (
        gram + matmul(block, block.T),
        offset + jnp.sum(block * mean[None, :], axis=1),
        square + jnp.sum(mean * mean),
    )


def _inner_products(features, order):
    """Returns the centred Gram matrix, and the terms that restore the uncentred one."""
    n, d = len(order), features.shape[1]
    step = max(1, _BLOCK // n)
    zeros = jnp.zeros((n, n), as_float("features", features[:1, :1]).dtype)
    total = zeros, zeros[0], zeros[0, 0]
    for start in range(0, d, step):
        block = as_float("features", features[:, start : start + step])[order]
        total = _add_block(total, block)
    return map(np.asarray, total)


def _geometry(features, order, starts):
    # Centred features give more accurate distances. The cosines need uncentred ones:
    # <f_i, f_j> = <f_i - m, f_j - m> + <f_i - m, m> + <f_j - m, m> + <m, m>.
    centred, offset, square = _inner_products(features, order)
    check_finite(centred, offset, square)
    plain = centred + offset[:, None] + offset[None, :] + square
    norms = np.sqrt(np.maximum(np.diagonal(plain), 0))
    if not np.any(norms):
        raise ValueError(
            "features must not be zero for every sample, got a dead layer; leave it out"
        )
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = np.minimum(np.abs(plain) * inverse[:, None] * inverse[None, :], 1)
    own = np.diagonal(centred)
    squares = np.maximum(own[:, None] + own[None, :] - 2 * centred, 0)
    return _Geometry(cosines, squares, centred, norms, starts)


def _separation(geometry, include_diagonal):
    starts = geometry.starts
    counts = np.diff(starts, append=len(geometry.norms))
    rows = np.add.reduceat(geometry.cosines, starts, axis=0, dtype=np.float64)
    sums = np.add.reduceat(rows, starts, axis=1)  # [k, k], class by class
    within, pairs = np.diagonal(sums), counts**2
    if not include_diagonal:
        own = np.diagonal(geometry.cosines)
        within = within - np.add.reduceat(own, starts, dtype=np.float64)
        pairs = counts * (counts - 1)
    between = sums / counts[:, None] / counts[None, :]
    k = len(starts)
    mean_between = (between.sum() - np.trace(between)) / (k * (k - 1))
    return np.mean(within / pairs) - mean_between


def _entropy(gram, d):
    """Returns the entropy (nats) of the squared singular values of one class."""
    gram = np.float64(gram)
    gram = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
    # Eigenvalues beyond the rank are round-off, and there can be hundreds of them.
    rank = min(len(gram) - 1, d)
    values = np.maximum(np.linalg.eigvalsh(gram)[-rank:], 0)
    if values.sum() == 0:  # constant features
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(-np.sum(shares * np.log(shares)))


def _information(geometry, d, log_const):
    entropies, smallest = [], []
    for rows in geometry.classes:
        entropy = _entropy(geometry.centred[rows, rows], d)
        largest = math.log(log_const or rows.stop - rows.start - 1)
        entropies.append(entropy / largest if largest else 0.0)
        smallest.append(geometry.cosines[rows, rows].min())
    return (1 - np.mean(smallest, dtype=np.float64)) * np.mean(entropies)


def _efficiency(geometry, packing):
    distances, lengths = [], []
    for rows in geometry.classes:
        others = np.delete(geometry.squares[rows], rows, axis=1)
        distances.append(np.sqrt(others.min()))
        lengths.append(geometry.norms[rows].mean(dtype=np.float64))
    return packing * 2 * np.mean(distances, dtype=np.float64) / np.mean(lengths)


def knowledge_quality(
    features: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    *,
    n_train: int | None = None,
    include_diagonal: bool = False,
    log_const: float | None = None,
) -> KnowledgeQuality:
    r"""Computes the knowledge quality of one layer's features.

    .. math:: S &= \mathrm{mean}_c \mathrm{mean}_{i \ne j \in c} G_{ij}
              - \mathrm{mean}_{c \ne c'} \mathrm{mean}_{i \in c, j \in c'} G_{ij} \\
              I &= \big(1 - \mathrm{mean}_c \min_{i, j \in c} G_{ij}\big)\,
              \mathrm{mean}_c \frac{H_c}{\log(n_c - 1)} \\
              E &= K \frac{2\, \mathrm{mean}_c \min_{i \in c, j \notin c}
              \|f_i - f_j\|}{\mathrm{mean}_c \mathrm{mean}_{i \in c} \|f_i\|}, \quad
              K = (n_\mathrm{train} / \pi)^{1 / \min(n, d)}, \quad Q = S + \sqrt{I E}

    where G_ij is the absolute cosine between samples i and j. H_c is the entropy, in
    nats, of the squared singular values of the centred features of class c, divided by
    their sum. The n_c centred samples of a class have at most n_c - 1 nonzero singular
    values, so H_c is divided by log(n_c - 1). This divisor is the same for all layers,
    so layers can be compared, but H_c / log(n_c - 1) cannot reach 1 for a layer with
    fewer than n_c - 1 features. S, I, E and Q do not depend on the scale of the
    features.

    All values depend on the number of samples, so compare layers on the same samples.
    The paper uses 5,000 random training samples, with the same number from each class;
    for I it uses up to 500 samples of each class.

    This function cannot be traced, because shapes depend on values. It takes 2 n^2 d
    floating point operations. Its memory is a few `[n, n]` matrices, for any d. With
    5,000 samples it takes 1 second of CPU time for 512 features, and 13 seconds for
    16,384.

    Args:
      features: features of one layer, floating, shape `[n, ...]`, flattened to
        `[n, d]`. NumPy arrays are moved to the device in blocks.
      labels: int, shape `[n]`; samples with negative labels are left out.
      n_train: size of the training set that the samples were drawn from; used in K.
        None uses the number of samples.
      include_diagonal: True includes each sample's alignment with itself in S, as in
        the released code.
      log_const: number whose logarithm divides H_c; None uses n_c - 1, the released
        code 5. `**RELEASED` sets this and `include_diagonal` as in the released code.

    Returns:
      `KnowledgeQuality` of floats.

    Raises:
      ValueError: if a shape or dtype is wrong, if there are fewer than two classes, if
        a class has only one sample, if features are not finite or are all zero, or if
        an option is out of range.

    References:
      Cooper et al., Logit-Based Losses Limit the Effectiveness of Feature Knowledge
      Distillation, 2025, arXiv:2511.14981, and its code, Thegolfingocto/KD_wo_CE.

    Examples:
      >>> features = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
      >>> quality = knowledge_quality(features, np.array([0, 0, 1, 1]))
      >>> quality.S, quality.I  # orthogonal classes, each on one line
      (1.0, 0.0)
    """
    features = flat_features(features)
    order, starts = by_class(labels, features.shape[0])
    n, d = len(order), features.shape[1]
    n_train = n if n_train is None else n_train
    check_number("n_train", n_train, positive=True)
    if log_const is not None and not log_const > 1:
        raise ValueError(f"log_const must be above 1, got {log_const}; None is n_c - 1")

    geometry = _geometry(features, order, starts)
    packing = (n_train / math.pi) ** (1 / min(n, d))
    separation = float(_separation(geometry, include_diagonal))
    information = float(_information(geometry, d, log_const))
    efficiency = float(_efficiency(geometry, packing))
    quality = separation + math.sqrt(max(information, 0) * efficiency)
    return KnowledgeQuality(separation, information, efficiency, quality, packing)


def _direction(features):
    """Returns the Gram matrix, centred without its diagonal and of length 1."""
    features = flat_features(features)
    n = features.shape[0]
    if n < 4:
        raise ValueError(f"features must have 4 samples at least, got {n}")
    gram = np.array(next(_inner_products(features, np.arange(n))), np.float64)
    check_finite(gram)
    scale = np.abs(gram).max() * n
    np.fill_diagonal(gram, 0)
    rows = gram.sum(1) / (n - 2)
    gram += rows.sum() / (n - 1) - rows[:, None] - rows[None, :]
    np.fill_diagonal(gram, 0)
    length = np.linalg.norm(gram)
    # Of constant features only round-off of the float32 Gram matrix remains.
    return gram / length if length > 1e-6 * scale else np.zeros_like(gram)


def layer_similarity(features: Iterable[jax.Array | np.ndarray]) -> np.ndarray:
    r"""Computes the linear centred kernel alignment (CKA) of every pair of layers.

    .. math:: C_{kl} = \frac{\langle \tilde K_k, \tilde K_l \rangle}
              {\|\tilde K_k\|_F \|\tilde K_l\|_F}

    where K_k is the ``[n, n]`` Gram matrix of layer k, centred without its diagonal
    (unbiased estimate of HSIC), so that C is 0 on average for independent features of
    any width. C is 1 if two layers differ only by a rotation, a shift and a scale. It
    takes 2 n^2 d floating point operations for each layer, and 8 n^2 bytes of memory.
    A thousand samples are enough to find copies.

    Args:
      features: features of each layer for the same samples, floating, shape
        `[n, ...]`, flattened; widths may differ. A generator holds only one layer in
        memory.

    Returns:
      Float64 array `[layers, layers]` of values in [-1, 1]. Constant features have the
      similarity 0 to all layers.

    Raises:
      ValueError: if a shape or dtype is wrong, if layers have different numbers of
        samples or fewer than four, or if features are not finite.

    References:
      Kornblith et al., Similarity of neural network representations revisited, 2019,
      arXiv:1905.00414, section 3. Song et al., Feature selection via dependence
      maximization, 2012, equation 5, for the unbiased estimate.

    Examples:
      >>> x = np.eye(6, 3)
      >>> layer_similarity([x, 2 * x[:, ::-1] + 1]).round(3)
      array([[1., 1.],
             [1., 1.]])
    """
    directions = [_direction(layer) for layer in features]
    sizes = {len(direction) for direction in directions}
    if len(sizes) != 1:
        raise ValueError(
            f"features must be those of the same samples in all layers, got "
            f"{len(directions)} layers of {sorted(sizes)} samples"
        )
    rows = np.array(directions).reshape(len(directions), -1)
    return rows @ rows.T


def _numbers(quality) -> tuple[Any, np.ndarray]:
    """Returns the layers' names and their qualities."""
    if isinstance(quality, Mapping):
        names, values = tuple(quality), list(quality.values())
    else:
        names, values = tuple(range(len(quality))), list(quality)
    values = [v.Q if isinstance(v, KnowledgeQuality) else float(v) for v in values]
    for name, value in zip(names, values, strict=True):
        if math.isnan(value):
            raise ValueError(f"quality of layer {name!r} is NaN; leave the layer out")
    return names, np.array(values)


def select_layers(
    quality: Mapping[str, float | KnowledgeQuality]
    | Sequence[float | KnowledgeQuality],
    count: int = 4,
    *,
    last: bool = False,
    similarity: np.ndarray | None = None,
    most_similar: float = 0.98,
) -> tuple[str, ...] | tuple[int, ...]:
    """Chooses the layers of highest quality, without copies of a chosen layer.

    Layers are taken in the order of their quality; with ``last``, the last layer comes
    first. A layer is left out if its similarity to a layer that is already taken is
    above ``most_similar``, because the blocks of one stage can be copies of each other
    and then have the same quality. Quality alone may also leave out the last layer,
    from which the teacher's head reads the classes.

    The released code has fixed lists of layers instead, those of arXiv:2511.14981. The
    paper has neither ``last`` nor ``similarity``.

    Args:
      quality: quality of each layer from the first to the last, as a mapping by name or
        a sequence. `jax.jit` returns a dict sorted by name ("block10" before "block2"),
        so take the order of the layers from the network, not from such a dict.
      count: number of layers to choose; 4 in the paper.
      last: True always chooses the last layer.
      similarity: array `[layers, layers]` of `layer_similarity`, in the order of
        ``quality``; None does not look for copies.
      most_similar: largest similarity of two chosen layers.

    Returns:
      The names of the `count` best layers (or indices, for a sequence) in order of
      depth; fewer if the others are copies of these. Of layers with equal quality, the
      first is chosen.

    Raises:
      ValueError: if `count` is not between 1 and the number of layers, a quality is
        not a number, or `similarity` has another shape or contains NaN.

    References:
      Cooper et al., 2025, arXiv:2511.14981.

    Examples:
      >>> select_layers({"stem": 0.1, "block1": 0.9, "block2": 0.4, "last": 0.7}, 2)
      ('block1', 'last')
      >>> select_layers([0.1, 0.9, 0.4, 0.7], 2)
      (1, 3)
      >>> copies = np.array([[1.0, 0.99, 0.5], [0.99, 1.0, 0.5], [0.5, 0.5, 1.0]])
      >>> select_layers([0.9, 0.8, 0.1], 2, similarity=copies)
      (0, 2)
    """
    names, values = _numbers(quality)
    total = len(names)
    if not 1 <= count <= total:
        raise ValueError(
            f"count must be between 1 and the number of layers {total}, got {count}"
        )
    alike = np.zeros((total, total)) if similarity is None else np.asarray(similarity)
    if alike.shape != (total, total) or np.isnan(alike).any():
        raise ValueError(
            f"similarity must have shape [{total}, {total}] without NaN, got "
            f"{list(alike.shape)}; pass that of layer_similarity for these layers"
        )
    values[-1] = math.inf if last else values[-1]
    best: list[int] = []
    for layer in np.argsort(-values, kind="stable"):
        if len(best) < count and np.all(alike[layer, best] <= most_similar):
            best.append(int(layer))
    return tuple(names[i] for i in sorted(best))
