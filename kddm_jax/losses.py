"""Computes the distillation loss, which is cross-entropy plus weighted distances.

``loss = task_weight * task + lambda * sum_t weight_t * D_t(student, teacher)``, where
the task is the cross-entropy and lambda the argument ``weight`` of `distill_loss`.
It takes arrays and returns scalars, so it works with Flax, Equinox and plain functions,
under jit, grad, vmap, pmap and shard_map.  The teacher gets no gradient.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kddm_jax.distances import (
    Distance,
    Options,
    callable_name,
    get_distance,
    hashable_options,
)
from kddm_jax.numerics import masks
from kddm_jax.numerics.checks import check_choice, check_labels, check_number
from kddm_jax.numerics.classes import with_mask
from kddm_jax.numerics.devices import (
    gather,
    groups_of,
    mean_over_images,
    unsharded,
    worst,
)
from kddm_jax.numerics.linalg import constant
from kddm_jax.numerics.normalization import check_normalization, normalize
from kddm_jax.numerics.positions import POSITIONS, as_matrices
from kddm_jax.numerics.targets import (
    check_targets,
    class_labels,
    cross_entropy,
    is_soft,
)

Features = jax.Array | Mapping[str, jax.Array]
NOTHING: Mapping[str, jax.Array] = MappingProxyType({})


@dataclass(frozen=True)
class Term:
    """Describes one distance in the loss, between a student and a teacher layer.

    Terms are hashable.

    Attributes:
      distance: a key of `DISTANCES`, a `Distance`, or a callable of ``(x, y)``.
      weight: number ``>= 0`` that multiplies this distance; lambda then multiplies the
        sum of all terms.
      layers: ``(student_layer, teacher_layer)``, the layers to compare if features are
        mappings from layer name to array.  None compares ``"features"`` of both
        networks.  Distances of predictions do not need layers.
      options: keyword arguments of the distance, as a mapping; stored as sorted pairs.
      name: name of this term in the dict that `distill_loss` returns; None uses the key
        of the distance or the function's name.
      positions: how a distance of features treats maps ``[n, h, w, c]`` or tokens ``[n,
        t, c]``.  ``"pool"`` averages them over positions.  ``"each"`` makes every
        position a sample with the label of its image; the larger map is first
        average-pooled to the grid of the smaller one.
      normalization: normalization for this term only, as in `distill_loss`; None uses
        the one given to `distill_loss`.

    Raises:
      ValueError: the weight is not a number ``>= 0``, an option is an array, a choice
        is unknown, or a distance without features has a normalization.

    Examples:
      >>> Term("w2", weight=0.5, options={"solver": "exact"}).options
      (('solver', 'exact'),)
    """

    distance: str | Distance | Callable[..., jax.Array]
    _: KW_ONLY
    weight: float = 1.0
    layers: tuple[str, str] | None = None
    options: Options = ()
    name: str | None = None
    positions: str = "pool"
    normalization: str | None = None

    def __post_init__(self):
        """Checks everything that does not depend on arrays."""
        object.__setattr__(self, "options", hashable_options(self.options))
        object.__setattr__(self, "layers", self.layers and tuple(self.layers))
        name = _term_name(self)
        if isinstance(self.weight, Tracer):
            raise ValueError(
                f"weight of {name} is traced, but a Term is a constant of the program; "
                "pass a number, and trace lambda: distill_loss(..., weight=...)"
            )
        check_number(f"weight of {name}", self.weight, positive=False)
        object.__setattr__(self, "weight", float(self.weight))
        check_choice("positions", self.positions, POSITIONS)
        check_normalization(self.normalization)
        row = get_distance(self.distance)
        if self.normalization is not None and "features" not in row.inputs:
            raise ValueError(
                f"normalization={self.normalization!r} is for distances of features, "
                f"but {name} compares {row.inputs[0]}; leave it out"
            )


def _term_name(term):
    if term.name is not None:
        return term.name
    if isinstance(term.distance, str):
        name = term.distance
    else:
        fn = term.distance.fn if isinstance(term.distance, Distance) else term.distance
        name = callable_name(fn)
    return name if term.layers is None else f"{name}@{term.layers[0]}"


def _is_one(distance):
    """Returns whether this is a single distance rather than Terms."""
    return isinstance(distance, str | Distance) or callable(distance)


def _as_terms(distance):
    """Turns one distance, one Term or a sequence of Terms into a tuple of Terms."""
    if isinstance(distance, Term):
        terms = (distance,)
    elif isinstance(distance, Sequence) and not isinstance(distance, str):
        terms = tuple(distance)
    else:
        terms = (Term(distance),)
    for term in terms:
        if not isinstance(term, Term):
            raise ValueError(
                "a sequence of distances must hold Terms, got "
                f"{type(term).__name__}; write Term({term!r}, weight=...)"
            )
    names = [_term_name(term) for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"terms must have different names, got {', '.join(names)}")
    for name in names:
        if name == "task" or "/" in name:
            raise ValueError(
                f'a term cannot be named {name!r}: "task" is the cross-entropy and '
                '"/" marks diagnostics; give it another name'
            )
    return terms


def _lambda(weight, distance, normalization):
    """Returns lambda, by default 1 for Terms or the catalogue's for one distance."""
    if weight is not None:
        check_number("weight", weight, positive=False)
        return weight
    if not _is_one(distance):
        return 1.0
    row = get_distance(distance)
    if normalization not in row.weights:
        known = [f"normalization={name!r}" for name in row.weights]
        raise ValueError(
            f"weight is None, but {row.title or callable_name(row.fn)} has no default "
            f"weight with normalization={normalization!r}"
            + (f", only with {', '.join(known)}" if known else "")
            + "; pass a number, weight=..."
        )
    return row.weights[normalization]


def _check_options(distance, options):
    """Rejects options given together with Terms, and arrays other than scalars."""
    if options and not _is_one(distance):
        raise ValueError(
            f"got the option {', '.join(options)}, but Terms have options of their "
            "own; write Term(..., options={...})"
        )
    hashable_options({name: o for name, o in options.items() if np.ndim(o)})


DEFAULT_LAYER = "features"


def _compared(features, terms, side, n):
    """Returns the layers that some term compares; no other layers are gathered."""
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
    """Returns whether a term's distance compares layers rather than predictions."""
    return not {"features", "maps"}.isdisjoint(get_distance(term.distance).inputs)


def _layers(term):
    return (DEFAULT_LAYER, DEFAULT_LAYER) if term.layers is None else term.layers


def _pair(term, batch):
    """Returns both arrays of a term's layers, None if it compares predictions."""
    student, teacher = _layers(term)
    return [batch["student"].get(student), batch["teacher"].get(teacher)]


def _repeated(mask, arrays):
    """Repeats the mask of images for each of their positions."""
    return None if mask is None else jnp.repeat(mask, len(arrays[0]) // len(mask))


def _features(term, batch, whole, normalization):
    """Returns the normalized features of both sides, and their labels.

    Statistics are computed over ``whole``, the batch of all devices.
    """
    pair, labels = as_matrices(_pair(term, batch), batch["labels"], term.positions)
    same = pair
    if whole is not batch:
        same, _ = as_matrices(_pair(term, whole), whole["labels"], term.positions)
    mask, whole_mask = _repeated(batch["mask"], pair), _repeated(whole["mask"], same)
    name = term.normalization or normalization
    return normalize(pair, same, name, mask=mask, whole_mask=whole_mask), labels


def _arguments(row, term, batch, whole, normalization):
    """Returns the arrays that the entry's function takes, in order."""
    pair, labels = _pair(term, batch), batch["labels"]
    known = {"maps": pair}
    if "features" in row.inputs:
        known["features"], labels = _features(term, batch, whole, normalization)
    known["logits"] = [batch["student_logits"], batch["teacher_logits"]]
    known["labels"], known["key"] = [labels], [batch["key"]]
    arguments = []
    for kind in row.inputs:
        arrays = known.get(kind, [batch["teacher_data"].get(kind)])
        if any(array is None for array in arrays):
            missing = {"logits": "teacher_logits", "key": "key=jax.random.key(...)"}
            missing = missing.get(kind, f"teacher_data={{{kind!r}: ...}}")
            raise ValueError(f"distance {_term_name(term)!r} needs {missing}, got None")
        arguments += arrays
    return arguments


def _options(row, term, given, num_classes):
    """Returns the function's keyword arguments; requires those without a default."""
    options = {**dict(row.options), **dict(term.options), **given}
    if wrong := [name for name in options if name in row.inputs]:
        raise ValueError(
            f"{wrong[0]} of distance {_term_name(term)!r} is an array, not an option; "
            f"pass it as teacher_data={{{wrong[0]!r}: ...}}"
        )
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


def _masked(row, term, mask, arrays):
    """Returns the keyword argument ``mask``, or ``{}`` if there is no mask."""
    if mask is None:
        return {}
    known = inspect.signature(row.fn).parameters.values()
    if not any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in known):
        raise ValueError(
            f"distance {_term_name(term)!r} does not take a mask; give it a keyword "
            "argument mask, shape [n], zero for no sample, or leave mask out"
        )
    return {"mask": _repeated(mask, arrays)}


def _check_scalar(name, value):
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must return a scalar, got shape {list(jnp.shape(value))}; average "
            "it over samples"
        )


def _evaluate(term, local, gathered, options, *, normalization, axis_name, groups):
    """Computes a term's value and diagnostics, with an axis over the global batch."""
    row = get_distance(term.distance)
    # A mean over images needs no gathering: it is the mean of the devices' means.
    local_only = axis_name is not None and row.per_sample
    batch = local if local_only else gathered
    chosen = term.normalization or normalization
    row.check_normalization(_term_name(term), chosen, options)
    arrays = _arguments(row, term, batch, gathered, normalization)
    options = {**options, **_masked(row, term, batch["mask"], arrays)}
    if row.diagnose is None:
        value, stats = row.fn(*arrays, **options), {}
    else:
        value, stats = row.diagnose(*arrays, **options)
    _check_scalar(f"distance {_term_name(term)!r}", value)
    if local_only:
        labelled = "labels" in row.inputs
        count = jnp.sum(local["labels"] >= 0) if labelled else jnp.ones(())
        if local["mask"] is not None and not labelled:
            count = jnp.sum(local["mask"])
        value = mean_over_images(value, count, axis_name, groups)
    if groups is not None:
        # Every device has its group's value, so the mean over devices is the mean over
        # groups.  The same is true of the gradients, which the caller averages.
        value = jax.lax.pmean(value, axis_name)
    if local_only or groups is not None:
        stats = worst(stats, axis_name)
    return value, stats


def _check_arrays(student_logits, labels, mask, num_classes):
    """Checks the arrays that all terms share, and returns the labels and the mask."""
    if student_logits.ndim != 2:
        raise ValueError(
            f"student_logits must have shape [n, k], got {list(student_logits.shape)}"
        )
    n, k = student_logits.shape
    mask, labels = masks.check_mask(mask, n), jnp.asarray(labels)
    if is_soft(labels):
        kept = masks.zeroed(mask, labels)[0] if len(labels) == n else labels
        labels = check_targets(kept, n, k)
    else:
        labels = with_mask(labels, mask)
        check_labels(labels, n, num_classes=k if num_classes is None else num_classes)
    return labels, mask


def distill_loss(
    student_features: Features,
    teacher_features: Features,
    labels: jax.Array,
    student_logits: jax.Array,
    teacher_logits: jax.Array | None = None,
    *,
    distance: str | Distance | Callable[..., jax.Array] | Term | Sequence[Term],
    weight: float | jax.Array | None = None,
    normalization: str | None = None,
    task_weight: float | jax.Array = 1.0,
    task: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    mask: jax.Array | None = None,
    teacher_data: Mapping[str, jax.Array] = NOTHING,
    key: jax.Array | None = None,
    num_classes: int | None = None,
    axis_name: str | None = None,
    group_size: int | None = None,
    **options: object,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    r"""Computes the distillation loss and its terms.

    .. math:: L = w\, CE(s, y) + \lambda \sum_t w_t\, D_t(x, \mathrm{stop}(x_T))

    No gradient reaches the teacher.  With ``axis_name``, arrays are gathered first, so
    that every device computes the loss of the *global* batch.  ``jax.shard_map`` gives
    the right gradient of parameters that are equal on all devices.  Under pmap or
    ``check_vma=False``, average it over devices with ``pmean``; never sum it.

    With ``group_size``, features are gathered only within groups of that many devices.
    This is a different loss: the distance is computed in each group and averaged over
    groups.  The task loss is still computed over the global batch.

    Cost: n k plus the cost of each distance, where n is the size of the global batch
    if there is an axis.  Gradient: with respect to the student only; transport
    distances have no second derivatives.  Not for: raw features of unknown scale with a
    weight from a table of results; use ``normalization="teacher"``, because the weights
    in those tables were chosen with it.

    Args:
      student_features: shape ``[n, d]``, or a mapping from layer name to array.  In a
        mapping, a Term without layers compares ``"features"``; see `Term` for maps and
        tokens.
      teacher_features: the teacher's features of the same images, in the same form.
      labels: int, shape ``[n]``.  Samples with a negative label are ignored by the
        cross-entropy and by distances that take labels; other distances use them.  Soft
        labels are float, ``[n, k]``, a probability for each class; distances that take
        labels use the most probable class, and a row of zeros means no label.
      student_logits: shape ``[n, k]``.
      teacher_logits: shape ``[n, k]``; only distances of predictions need them.
      distance: a key of `DISTANCES`, a `Distance`, a callable of ``(x, y)``, a `Term`
        or a sequence of them.
      weight: lambda, ``>= 0``, which multiplies the sum of all terms.  If it is None,
        lambda is the catalogue's default for the normalization with a single distance,
        and 1 with Terms.
      normalization: how to transform the features of both networks before a distance of
        features is computed: None, ``"teacher"``, ``"unit"``, ``"centered"`` or
        ``"standardized"``; see `numerics.normalization.normalize`.  Statistics run over
        the batch of all devices or of the group.  Options that have a unit, such as
        ``beta`` or ``epsilon``, refer to the normalized features.
      task_weight: weight of the task, ``>= 0``.
      task: function ``task(student_logits, labels) -> scalar`` that replaces the
        cross-entropy.  It gets the arrays of all devices, and must return a mean over
        the samples whose label is not negative.
      mask: shape ``[n]``; samples whose mask is zero are ignored by the loss, whatever
        their values.  None uses all samples.  A distance of your own must accept a
        keyword argument ``mask``; with ``positions="each"`` it has one entry for every
        position.
      teacher_data: mapping from name to array, for distances that need other arrays
        computed from the teacher, such as ``{"class_cost": ...}`` for ``"wkd_logits"``.
        The arrays must be equal on all devices and get no gradient.
      key: random key; only random distances need it.
      num_classes: number of classes, used to check labels that are not traced.
      axis_name: name of the mapped axis over which the batch is split.
      group_size: number of neighbouring devices along the axis that form a group.
        None computes the distance of the global batch.
      **options: options of a single distance (``solver``, ``covariance``, ...).  Terms
        have their own options.

    Returns:
      ``(loss, terms)``: the loss, and a dict of scalars with ``"task"``, the unweighted
      value of each distance under its name, and its diagnostics under names such as
      ``"name/converged"``.

    Raises:
      ValueError: a shape is wrong, a name is unknown, a weight is negative or missing,
        or the key, logits or teacher_data are missing; or ``group_size`` does not
        divide the devices or is used in a ``shard_map`` with ``check_vma=True``.

    References:
      Fernandes Montesuma, KD2M, 2025 (arXiv 2504.01757), the objective.

    Examples:
      >>> x, s, labels = jnp.ones((4, 2)), jnp.zeros((4, 3)), jnp.zeros(4, int)
      >>> loss, terms = distill_loss(x, x + 1, labels, s, distance="l2", weight=0.5)
      >>> loss, terms["task"], terms["l2"]  # log 3 + 0.5 * 2
      (Array(2.0986, dtype=float32), Array(1.0986, dtype=float32),
       Array(2., dtype=float32))
    """
    terms = _as_terms(distance)
    _check_options(distance, options)
    check_normalization(normalization)
    lam = _lambda(weight, distance, normalization)
    check_number("task_weight", task_weight, positive=False)
    student_logits = jnp.asarray(student_logits)
    labels, mask = _check_arrays(student_logits, labels, mask, num_classes)
    (student_logits,), n = masks.zeroed(mask, student_logits), len(student_logits)
    soft = {"targets": labels} if is_soft(labels) else {}
    labels = class_labels(labels)

    local = {
        "mask": mask,
        "student": _compared(student_features, terms, "student", n),
        "teacher": _compared(teacher_features, terms, "teacher", n),
        "labels": labels,
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        **soft,
    }
    for name in ("teacher", "teacher_logits"):
        local[name] = jax.tree.map(constant, local[name])
    groups = groups_of(axis_name, group_size)
    gathered = whole = gather(local, axis_name, groups)
    if groups is not None:
        names = ("student_logits", "labels", *soft)
        whole = gather({name: local[name] for name in names}, axis_name)
    alike = {"teacher_data": jax.tree.map(constant, dict(teacher_data)), "key": key}
    alike = jax.tree.map(unsharded, alike)

    loss_of_task = cross_entropy if task is None else task
    targets = whole["targets"] if soft else whole["labels"]
    value = loss_of_task(whole["student_logits"], targets)
    _check_scalar("task", value)
    loss, results, weighted = task_weight * value, {"task": value}, []
    for term in terms:
        row, name = get_distance(term.distance), _term_name(term)
        value, stats = _evaluate(
            term,
            {**local, **alike},
            {**gathered, **alike},
            _options(row, term, options, num_classes),
            normalization=normalization,
            axis_name=axis_name,
            groups=groups,
        )
        weighted.append(term.weight * value)
        results[name] = value
        results.update({f"{name}/{stat}": number for stat, number in stats.items()})
    if weighted:
        loss = loss + lam * sum(weighted[1:], weighted[0])
    return loss, results
