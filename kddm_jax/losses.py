"""The distillation loss: cross-entropy plus weighted distances.

``loss = task_weight * cross_entropy + sum_t weight_t * D_t(student, teacher)``.
Arrays in, scalars out: no framework, so it composes with Flax, Equinox and plain
functions, under jit, grad, vmap, pmap and shard_map.  The teacher gets no gradient.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kddm_jax.distances import DISTANCES, Distance
from kddm_jax.numerics.checks import as_float, check_choice, check_labels, check_number
from kddm_jax.numerics.pooling import average_pool

DEFAULT_WEIGHT = 1e-3
Features = jax.Array | Mapping[str, jax.Array]


class Term(NamedTuple):
    """One weighted distance of a loss.

    Attributes:
      distance: a key of `DISTANCES`, a `Distance`, or a callable of ``(x, y)``.
      weight: lambda, ``>= 0``; an array (traced) or a float.
      layers: student and teacher key, where features are mappings layer -> array;
        None is ``"features"``.  A distance of predictions has no need of any.
      options: keyword arguments of the distance.
      name: in the loss's terms; None takes the key or the function's name.
      view: how a distance of features reads maps ``[n, h, w, c]`` or tokens ``[n, t,
        c]``: ``"pool"`` averages them over positions, ``"positions"`` takes every
        position as a sample (of its image's label), the larger map averaged down to
        the smaller one's grid.
    """

    distance: str | Distance | Callable[..., jax.Array]
    weight: float | jax.Array = DEFAULT_WEIGHT
    layers: tuple[str, str] | None = None
    options: Mapping[str, object] = MappingProxyType({})
    name: str | None = None
    view: str = "pool"


VIEWS = ("pool", "positions")


def get_distance(distance: str | Distance | Callable[..., jax.Array]) -> Distance:
    """Looks a distance up, or makes a row of a callable.

    Args:
      distance: a key of `DISTANCES`, a `Distance`, or a callable of ``(x, y)``.

    Returns:
      The `Distance`.

    Raises:
      ValueError: an unknown key, naming the known ones.

    Examples:
      >>> get_distance("w2").title
      'W2 (E)'
    """
    if isinstance(distance, Distance):
        return distance
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise ValueError(
                f"unknown distance {distance!r}; known: {', '.join(DISTANCES)}"
            )
        return DISTANCES[distance]
    if callable(distance):
        return Distance(distance, title=_callable_name(distance))
    raise ValueError(
        "distance must be a key of DISTANCES, a Distance or a callable of (x, y), "
        f"got {type(distance).__name__}"
    )


def _callable_name(fn):
    return getattr(fn, "__name__", type(fn).__name__)


def _term_name(term):
    if term.name is not None:
        return term.name
    if isinstance(term.distance, str):
        name = term.distance
    else:
        fn = term.distance.fn if isinstance(term.distance, Distance) else term.distance
        name = _callable_name(fn)
    return name if term.layers is None else f"{name}@{term.layers[0]}"


def carries_weights(distance: object) -> bool:
    """Tells whether ``distance`` is a Term or a sequence of Terms.

    Args:
      distance: as in `distill_loss`.

    Returns:
      Whether it has weights and options of its own.
    """
    single = isinstance(distance, str | Distance) or callable(distance)
    return isinstance(distance, Sequence) and not single


def _as_terms(distance, weight, options):
    if carries_weights(distance):
        if isinstance(distance, Term):
            distance = (distance,)
        if weight is not None or options:
            raise ValueError(
                "a sequence of Terms carries its own weights and options; got also "
                + ", ".join([*(["weight"] if weight is not None else []), *options])
            )
        for term in distance:
            if not isinstance(term, Term):
                raise ValueError(
                    "a sequence of distances must hold Terms, got "
                    f"{type(term).__name__}; write Term({term!r}, weight=...)"
                )
        terms = tuple(distance)
    else:
        weight = DEFAULT_WEIGHT if weight is None else weight
        terms = (Term(distance, weight, options=options),)
    names = [_term_name(term) for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"terms must have different names, got {', '.join(names)}")
    for name in names:
        if name == "task" or "/" in name:
            raise ValueError(
                f'a term cannot be named {name!r}: "task" is the cross-entropy and '
                '"/" marks diagnostics; give it another name'
            )
    for name, term in zip(names, terms, strict=True):
        check_number(f"weight of {name}", term.weight, positive=False)
        check_choice("view", term.view, VIEWS)
    return terms


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Computes the mean cross-entropy of the labelled samples.

    .. math:: -\frac1n \sum_i \log \mathrm{softmax}(s_i)_{y_i}

    Args:
      logits: shape ``[n, k]``.
      labels: int, shape ``[n]``; negative labels are padding.

    Returns:
      Scalar, in nats.

    Examples:
      >>> cross_entropy(jnp.zeros((2, 4)), jnp.array([1, 3]))  # log 4
      Array(1.386, dtype=float32)
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    valid = labels >= 0
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(valid, labels, 0)
    )
    count = jnp.maximum(jnp.sum(valid), 1).astype(losses.dtype)
    return jnp.sum(jnp.where(valid, losses, 0)) / count


DEFAULT_LAYER = "features"


def _compared(features, terms, side, n):
    """The layers that some term compares, by name: no other is ever gathered."""
    if not isinstance(features, Mapping):
        features = {DEFAULT_LAYER: features}
    index = ("student", "teacher").index(side)
    layers = [_layers(term)[index] for term in terms if _takes_layers(term)]
    for layer in layers:
        if layer not in features:
            raise ValueError(
                f"{side}_features has no layer {layer!r}, only {', '.join(features)}; "
                "choose with Term(..., layers=(student_key, teacher_key))"
            )
        if features[layer].shape[0] != n:
            raise ValueError(
                f"{side}_features must have a row for each of the {n} labels, got "
                f"{features[layer].shape[0]}; pass all arrays of the same batch"
            )
    return {layer: features[layer] for layer in layers}


def _takes_layers(term):
    """Whether its distance compares features or maps: predictions have no layer."""
    return not {"features", "maps"}.isdisjoint(get_distance(term.distance).inputs)


def _layers(term):
    return (DEFAULT_LAYER, DEFAULT_LAYER) if term.layers is None else term.layers


def _pair(term, batch):
    """Student's and teacher's array of a term's layers; None of predictions'."""
    student, teacher = _layers(term)
    return [batch["student"].get(student), batch["teacher"].get(teacher)]


def _grids_alike(pair):
    """Maps of one grid, the smaller one along each side; tokens must match."""
    if all(array.ndim == 4 for array in pair):
        grid = tuple(
            min(sides) for sides in zip(*(a.shape[1:3] for a in pair), strict=True)
        )
        pair = [average_pool(as_float("maps", array), grid) for array in pair]
    if pair[0].shape[1:-1] != pair[1].shape[1:-1]:
        raise ValueError(
            "positions of student and teacher must correspond, got "
            f"{list(pair[0].shape)} and {list(pair[1].shape)}; give both as "
            '[n, h, w, c], or use view="pool"'
        )
    return pair


def _matrices(pair, labels, view):
    """Features ``[n, d]`` of both sides and their labels, whatever the layer's rank."""
    if all(array.ndim <= 2 for array in pair):
        return pair, labels
    if view == "pool":
        average = lambda a: jnp.mean(a, axis=tuple(range(1, a.ndim - 1)))
        return [
            a if a.ndim == 2 else average(as_float("maps", a)) for a in pair
        ], labels
    pair = _grids_alike(pair)
    flat = [array.reshape(-1, array.shape[-1]) for array in pair]
    return flat, jnp.repeat(labels, len(flat[0]) // len(labels))


def _arguments(row, term, batch, key):
    """The arrays that the row's function takes, in its order."""
    pair = _pair(term, batch)
    features, labels = pair, batch["labels"]
    if "features" in row.inputs:
        features, labels = _matrices(pair, labels, term.view)
    known = {
        "features": features,
        "maps": pair,
        "logits": [batch["student_logits"], batch["teacher_logits"]],
        "labels": [labels],
        "key": [key],
    }
    for kind in row.inputs:
        if kind not in known:
            raise ValueError(
                f"inputs of a Distance are {', '.join(known)}; got {kind!r}"
            )
        if any(array is None for array in known[kind]):
            cure = "teacher_logits" if kind == "logits" else "key=jax.random.key(...)"
            raise ValueError(f"distance {_term_name(term)!r} needs {cure}, got None")
    return [array for kind in row.inputs for array in known[kind]]


def _per_deviation(value, y, labels):
    """Divides by mean_i ||y_i - mean||^2 of the labelled samples, a constant.

    A teacher that is constant over the batch has no scale: then the term is zero.
    """
    y = as_float("teacher_features", y)
    valid = (labels >= 0).astype(y.dtype)[:, None]
    count = jnp.maximum(jnp.sum(valid), 1)
    mean = jnp.sum(valid * y, axis=0, keepdims=True) / count
    deviation = jnp.sum(valid * (y - mean) ** 2) / count
    rounding = jnp.finfo(y.dtype).eps * jnp.sum(valid * y * y) / count
    deviation = jax.lax.stop_gradient(deviation)
    known = deviation > rounding + jnp.finfo(y.dtype).tiny ** 0.5
    return jnp.where(known, value / jnp.where(known, deviation, 1), 0)


def _options(row, term, num_classes):
    """Keyword arguments of the row's function; those it cannot do without must be."""
    options = {**row.options, **term.options}
    known = inspect.signature(row.fn).parameters
    if num_classes is not None and "num_classes" in known:
        options.setdefault("num_classes", num_classes)
    needed = [p.name for p in known.values() if p.kind is p.KEYWORD_ONLY]
    needed = [name for name in needed if known[name].default is inspect.Parameter.empty]
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(
            f"distance {_term_name(term)!r} needs the option {', '.join(missing)}; "
            "pass it as a keyword, or in Term(..., options={...})"
        )
    return options


def _over_images(value, row, labels, axis_name, groups):
    """The mean of a group's images, padding left out."""
    count = jnp.ones((), value.dtype)
    if "labels" in row.inputs:
        count = jnp.sum(labels >= 0).astype(value.dtype)
    total, images = jax.lax.pmean(
        (count * value, count), axis_name, axis_index_groups=groups
    )
    return total / jnp.maximum(images, 1e-6)


def _worst(stats, axis_name):
    """The worst that a device says."""
    # neither has a derivative by axis, which diagnostics have no need of
    worst = lambda name: jax.lax.pmin if name == "converged" else jax.lax.pmax
    stats = jax.lax.stop_gradient(stats)
    return {name: worst(name)(stat, axis_name) for name, stat in stats.items()}


def _evaluate(term, local, gathered, *, key, num_classes, scale, axis_name, groups):
    """Value and diagnostics of a term: of the global batch if there is an axis."""
    row = get_distance(term.distance)
    # A mean over images needs no gathering: the mean of the devices' means is it.
    local_only = axis_name is not None and row.per_sample
    arrays = _arguments(row, term, local if local_only else gathered, key)
    options = _options(row, term, num_classes)
    if row.diagnose is None:
        value, stats = row.fn(*arrays, **options), {}
    else:
        value, stats = row.diagnose(*arrays, **options)
    if jnp.shape(value) != ():
        raise ValueError(
            f"distance {_term_name(term)!r} must return a scalar, "
            f"got shape {list(jnp.shape(value))}"
        )
    if local_only:
        value = _over_images(value, row, local["labels"], axis_name, groups)
    if scale == "teacher" and "squared" in row.promises and _takes_layers(term):
        pair = _pair(term, gathered)
        (_, y), labels = _matrices(pair, gathered["labels"], term.view)
        value = _per_deviation(value, y, labels)
    if groups is not None:
        # Every device holds its group's value; averaged over devices they have the
        # mean over groups, and so have the gradients that the caller averages.
        value = jax.lax.pmean(value, axis_name)
    if local_only or groups is not None:
        stats = _worst(stats, axis_name)
    return value, stats


def _check_axis(axis_name):
    """Refuses ``jax.shard_map(check_vma=True)``, whose gradients would be wrong.

    It replaces the transpose of a replicated argument by a sum over devices, so that
    gradients come out N times too large.  There, and only there, the index of the
    device has a type that varies over the axis.
    """
    if axis_name is None:
        return
    index = jax.typeof(jax.lax.axis_index(axis_name))
    if index.manual_axis_type.varying:
        raise ValueError(
            f"axis_name={axis_name!r} belongs to a jax.shard_map with check_vma=True "
            "(its default), under which gradients of this loss would be wrong; pass "
            "check_vma=False to jax.shard_map and average the gradients with "
            "jax.lax.pmean"
        )


def _groups_of(axis_name, group_size):
    """Devices that gather from each other, ``axis_index_groups``; None: all."""
    if group_size is None:
        return None
    if axis_name is None:
        raise ValueError(
            f"group_size={group_size} groups the devices of an axis, but axis_name is "
            "None; pass axis_name, or leave group_size out"
        )
    devices = jax.lax.axis_size(axis_name)
    if group_size < 1 or devices % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the {devices} devices of axis "
            f"{axis_name!r}; choose a divisor of {devices}"
        )
    if group_size == devices:
        return None
    return [
        list(range(start, start + group_size))
        for start in range(0, devices, group_size)
    ]


def _gather(tree, axis_name, groups=None):
    if axis_name is None:
        return tree
    return jax.tree.map(
        lambda a: jax.lax.all_gather(
            a, axis_name, axis=0, tiled=True, axis_index_groups=groups
        ),
        tree,
    )


def distill_loss(
    student_features: Features,
    teacher_features: Features,
    labels: jax.Array,
    student_logits: jax.Array,
    teacher_logits: jax.Array | None = None,
    *,
    distance: str | Distance | Callable[..., jax.Array] | Sequence[Term] = "w2",
    weight: float | jax.Array | None = None,
    task_weight: float | jax.Array = 1.0,
    scale: str | None = None,
    key: jax.Array | None = None,
    num_classes: int | None = None,
    axis_name: str | None = None,
    group_size: int | None = None,
    **options: object,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    r"""Computes the distillation loss and its terms.

    .. math:: L = w\, CE(s, y) + \sum_t \lambda_t\, D_t(x, \mathrm{stop}(x_T))

    No gradient reaches the teacher.  Under ``axis_name`` (pmap, or shard_map with
    ``check_vma=False``) arrays are gathered first, so that every device computes the
    loss of the *global* batch; average the gradients with ``pmean``, never sum them.

    With ``group_size`` features are gathered within groups of that many devices only,
    which is another loss: the mean over groups of the distance within each.  The
    cross-entropy remains that of the global batch.

    Cost: n k and that of each distance, of the global batch under ``axis_name``.
    Gradient: that of the loss by the student; second derivatives do not pass
    transport.  Not for: raw features of unknown scale at a weight from a table: take
    ``scale="teacher"``, by which weights there are chosen.

    Args:
      student_features: ``[n, d]``, or a mapping layer -> array, of which a Term
        without layers compares ``"features"``; see `Term` for maps and tokens.
      teacher_features: the same of the teacher, of the same images.
      labels: int, ``[n]``; negative ones are padding to the cross-entropy and to
        distances that take labels; other distances count every row.
      student_logits: ``[n, k]``.
      teacher_logits: ``[n, k]``; needed by distances of predictions only.
      distance: a key of `DISTANCES`, a `Distance`, a callable of ``(x, y)``, or a
        sequence of `Term`.
      weight: lambda, ``>= 0``; None is 1e-3.  Not with Terms.
      task_weight: of the cross-entropy.
      scale: ``"teacher"`` divides squared distances (rows that promise "squared") by
        the teacher's mean squared deviation, which makes the weight dimensionless;
        distances that have no scale stay as they are.  None leaves all.  A fixed
        ``beta`` or ``epsilon`` is not scaled along.
      key: for random distances.
      num_classes: checks concrete labels.
      axis_name: of the mapped axis that holds the devices' shares of the batch.
      group_size: devices of a group, neighbours along the axis; None: all, the
        distance of the global batch.
      **options: of the distance (``solver``, ``covariance``, ...).  Not with Terms.

    Returns:
      ``(loss, terms)``: scalars; ``terms`` holds ``"task"``, each distance by name,
      unweighted, and its diagnostics as ``"name/converged"`` and so on.

    Raises:
      ValueError: shapes, unknown names, a negative weight, a missing key or logits, a
        ``group_size`` that does not divide the devices, an axis of a ``shard_map``
        with ``check_vma=True``.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), the objective.

    Examples:
      >>> x, s, labels = jnp.ones((4, 2)), jnp.zeros((4, 3)), jnp.zeros(4, int)
      >>> loss, terms = distill_loss(x, x + 1, labels, s, distance="l2", weight=0.5)
      >>> loss, terms["task"], terms["l2"]  # log 3 + 0.5 * 2
      (Array(2.0986, dtype=float32), Array(1.0986, dtype=float32),
       Array(2., dtype=float32))
    """
    _check_axis(axis_name)
    terms = _as_terms(distance, weight, options)
    check_number("task_weight", task_weight, positive=False)
    if scale not in (None, "teacher"):
        raise ValueError(f'scale must be None or "teacher", got {scale!r}')
    student_logits = jnp.asarray(student_logits)
    if student_logits.ndim != 2:
        raise ValueError(
            f"student_logits must have shape [n, k], got {list(student_logits.shape)}"
        )
    n, k = student_logits.shape
    check_labels(labels, n, num_classes=k if num_classes is None else num_classes)

    local = {
        "student": _compared(student_features, terms, "student", n),
        "teacher": _compared(teacher_features, terms, "teacher", n),
        "labels": labels,
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
    }
    for name in ("teacher", "teacher_logits"):
        local[name] = jax.lax.stop_gradient(local[name])
    groups = _groups_of(axis_name, group_size)
    gathered = _gather(local, axis_name, groups)
    whole = gathered
    if groups is not None:
        names = ("student_logits", "labels")
        whole = _gather({name: local[name] for name in names}, axis_name)

    task = cross_entropy(whole["student_logits"], whole["labels"])
    loss, results = task_weight * task, {"task": task}
    for term in terms:
        value, stats = _evaluate(
            term,
            local,
            gathered,
            key=key,
            num_classes=num_classes,
            scale=scale,
            axis_name=axis_name,
            groups=groups,
        )
        name = _term_name(term)
        loss = loss + term.weight * value
        results[name] = value
        results.update({f"{name}/{stat}": number for stat, number in stats.items()})
    return loss, results
