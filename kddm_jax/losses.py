"""Computes the distillation loss, which is cross-entropy plus weighted distances.

``loss = task_weight * task + lambda * sum_t weight_t * D_t(student, teacher)``, where
the task is the cross-entropy and lambda the argument ``weight`` of `distill_loss`.
It takes arrays and returns scalars, so it works with Flax, Equinox and plain functions,
under jit, grad, vmap, pmap and shard_map.  The teacher gets no gradient.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp

from kddm_jax.distances import Distance, get_distance
from kddm_jax.numerics import masks
from kddm_jax.numerics.bank import Bank
from kddm_jax.numerics.checks import check_labels, check_number
from kddm_jax.numerics.devices import (
    gather,
    groups_of,
    mean_over_images,
    unsharded,
    worst,
)
from kddm_jax.numerics.linalg import constant
from kddm_jax.numerics.normalization import check_normalization, normalize
from kddm_jax.numerics.positions import as_matrices
from kddm_jax.numerics.targets import (
    check_targets,
    class_labels,
    cross_entropy,
    is_soft,
    predict_labels,
    without_labels,
)
from kddm_jax.numerics.tokens import (
    Mask,
    all_tokens,
    check_tokens,
    read_masks,
    tokens_of,
)
from kddm_jax.terms import (
    OF_BANK,
    Term,
    as_terms,
    check_arguments,
    check_options,
    lambda_of,
    term_name,
)

Features = jax.Array | Mapping[str, jax.Array]
NOTHING: Mapping[str, jax.Array] = MappingProxyType({})


DEFAULT_LAYER = "features"
LOGITS = "logits"  # the layer of the predictions


def _by_layer(features, logits):
    """Returns a network's layers, with its logits unless a layer has that name."""
    layers = {} if logits is None else {LOGITS: logits}
    if features is None:
        return layers
    own = features if isinstance(features, Mapping) else {DEFAULT_LAYER: features}
    return {**layers, **own}


def _compared(features, terms, side, n):
    """Returns the layers that some term compares; no other layers are gathered."""
    index = ("student", "teacher").index(side)
    layers = [
        _layers(term)[index]
        for term in terms
        if _takes_layers(term) and not (index and term.bank)
    ]
    for layer in layers:
        if layer == LOGITS and layer not in features:
            raise ValueError(
                f"a Term compares the layer {layer!r}, but {side}_logits is None; pass "
                f"{side}_logits"
            )
        if layer not in features:
            own = ", ".join(name for name in features if name != LOGITS)
            found = f"only {own}; choose with Term(..., layers=(student, teacher))"
            no = f"it is empty or None; pass {side}_features, or return it in Outputs"
            raise ValueError(
                f"{side}_features has no layer {layer!r}, {found if own else no}"
            )
        if features[layer].shape[0] != n:
            what = "logits" if layer == LOGITS else "features"
            raise ValueError(
                f"{side}_{what} must have a row for each of the {n} labels, got "
                f"{features[layer].shape[0]}; pass all arrays of the same batch, and "
                "with logits [n, t, k] layers [n, t, ...]"
            )
    return {layer: features[layer] for layer in layers}


def _takes_layers(term):
    """Returns whether a term's distance compares layers rather than predictions."""
    return not {"features", "maps"}.isdisjoint(get_distance(term.distance).inputs)


def _layers(term):
    student, teacher = term.layers or (DEFAULT_LAYER, DEFAULT_LAYER)
    return student, (teacher if term.bank is None else student)


def _pair(term, batch):
    """Returns both arrays of a term's layers, None if it compares predictions.

    With a bank, the student's layer stands in for the teacher's, too.
    """
    student, teacher = _layers(term)
    other = "teacher" if term.bank is None else "student"
    return [batch["student"].get(student), batch[other].get(teacher)]


def _matrices(term, batch):
    """Returns the features of both sides, their labels and their mask."""
    pair = _pair(term, batch)
    tokens = [
        tokens_of(batch["tokens"], name, layer)
        for name, layer in zip(_layers(term), pair, strict=True)
    ]
    return as_matrices(
        *(pair, batch["labels"], term.positions), mask=batch["mask"], tokens=tokens
    )


def _features(term, batch, whole, normalization):
    """Returns the normalized features of both sides, their labels and their mask.

    Statistics are computed over ``whole``, the batch of all devices.
    """
    pair, labels, mask = _matrices(term, batch)
    same, _, whole_mask = (
        (pair, labels, mask) if whole is batch else _matrices(term, whole)
    )
    name = term.normalization or normalization
    return normalize(pair, same, name, mask=mask, whole_mask=whole_mask), labels, mask


def _check_maps(term, batch):
    """Refuses masked tokens in a distance that gets layers as they are."""
    for name in _layers(term):
        if name in batch["tokens"]:
            raise ValueError(
                f"distance {term_name(term)!r} compares maps and cannot leave out "
                f"tokens of layer {name!r}; compare it with a distance of features, or "
                "leave it out of the mask"
            )


def _bank(row, term, batch, normalization, mask):
    """Returns the features of a term's bank, and its labels as keyword arguments."""
    name, bank = term_name(term), batch["teacher_data"].get(term.bank)
    if not isinstance(bank, Bank):
        raise ValueError(
            f"distance {name!r} needs teacher_data={{{term.bank!r}: Bank(...)}}, got "
            f"{type(bank).__name__}; pass a kddm_jax.Bank"
        )
    if (term.normalization or normalization) == "teacher":
        raise ValueError(
            f'normalization="teacher" of distance {name!r} needs the teacher\'s '
            'features of the batch, but it has a bank; take "unit" and a bank of '
            "unit rows, or None in distill_loss (other Terms can have their own) and "
            "divide features and bank by the same number"
        )
    if "labels" in row.inputs:
        return bank.features, {"labels_y": bank.labels, "weights_y": bank.weights}
    if mask is not None:
        raise ValueError(
            f"distance {name!r} with a bank cannot leave out samples by a mask; take a "
            "distance that takes labels, or leave mask out"
        )
    if bank.weights is not None:
        raise ValueError(
            f"distance {name!r} weights all rows of a bank alike, but this one has "
            "weights; take a distance that takes labels, or a bank without weights"
        )
    return bank.features, {}


def _arguments(row, term, batch, whole, normalization):
    """Returns the arrays that the entry's function takes, their labels and mask."""
    labels, mask = batch["labels"], batch["mask"]
    known = {"maps": _pair(term, batch)}
    if "maps" in row.inputs:
        _check_maps(term, batch)
    if "features" in row.inputs:
        known["features"], labels, mask = _features(term, batch, whole, normalization)
        if "logits" in row.inputs and len(labels) != len(batch["labels"]):
            raise ValueError(
                f'positions="each" gives {term_name(term)!r} several features for '
                'each prediction; use positions="pool"'
            )
    known["logits"] = [batch["student_logits"], batch["teacher_logits"]]
    known["labels"], known["key"] = [labels], [batch["key"]]
    arguments = []
    for kind in row.inputs:
        arrays = known.get(kind, [batch["teacher_data"].get(kind)])
        if any(array is None for array in arrays):
            missing = {"logits": "teacher_logits", "key": "key=jax.random.key(...)"}
            missing = missing.get(kind, f"teacher_data={{{kind!r}: ...}}")
            raise ValueError(f"distance {term_name(term)!r} needs {missing}, got None")
        arguments += arrays
    return arguments, labels, mask


def _options(row, term, given, num_classes):
    """Returns the function's keyword arguments; requires all that have no default."""
    options = {**dict(row.options), **dict(term.options), **given}
    if wrong := [name for name in options if name in row.inputs]:
        raise ValueError(
            f"{wrong[0]} of distance {term_name(term)!r} is an array, not an option; "
            f"pass it as teacher_data={{{wrong[0]!r}: ...}}"
        )
    if "num_classes" in inspect.signature(row.fn).parameters:
        options.setdefault("num_classes", num_classes)
    # `_masked` passes the mask, and `_bank` the arguments of a bank.
    later = OF_BANK if term.bank is not None and "labels" in row.inputs else ()
    check_arguments(term_name(term), row, (*options, "mask", *later))
    return options


def _masked(row, term, mask):
    """Returns the keyword argument ``mask``, or ``{}`` if there is no mask."""
    known = inspect.signature(row.fn).parameters.values()
    if mask is None:
        needed = any(p.name == "mask" and p.default is p.empty for p in known)
        return {"mask": None} if needed else {}
    if not any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in known):
        raise ValueError(
            f"distance {term_name(term)!r} does not take a mask; give it a keyword "
            "argument mask, shape [n], zero for no sample, or leave mask out"
        )
    return {"mask": mask}


def _check_scalar(name, value):
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} must return a scalar, got shape {list(jnp.shape(value))}; average "
            "it over samples"
        )


def _count(row, labels, mask):
    """Returns this device's weight in a mean over images: the number of its samples."""
    counted = mask
    if "labels" in row.inputs:
        counted = labels >= 0 if mask is None else (labels >= 0) & mask
    return jnp.ones(()) if counted is None else jnp.sum(counted)


def _evaluate(term, local, gathered, options, *, normalization, axis_name, groups):
    """Computes a term's value and diagnostics, with an axis over the global batch."""
    row = get_distance(term.distance)
    # A mean over images needs no gathering: it is the mean of the devices' means.
    local_only = axis_name is not None and row.per_sample
    batch = local if local_only else gathered
    chosen = term.normalization or normalization
    row.check_normalization(term_name(term), chosen, options)
    arrays, labels, mask = _arguments(row, term, batch, gathered, normalization)
    options = {**options, **_masked(row, term, mask)}
    if term.bank is not None:
        # A bank follows the student's features, which stood in for it.
        arrays[row.inputs.index("features") + 1], more = _bank(
            row, term, batch, normalization, mask
        )
        options |= more
    if row.diagnose is None:
        value, stats = row.fn(*arrays, **options), {}
    else:
        value, stats = row.diagnose(*arrays, **options)
    _check_scalar(f"distance {term_name(term)!r}", value)
    if local_only:
        count = _count(row, labels, mask)
        value = mean_over_images(value, count, axis_name, groups)
    if groups is not None:
        # Every device has its group's value, so the mean over devices is the mean over
        # groups.  The same is true of the gradients, which the caller averages.
        if mask is None:
            value = jax.lax.pmean(value, axis_name)
        else:  # a group without samples has no part
            present = jnp.any(gather(mask, axis_name, groups) if local_only else mask)
            value = mean_over_images(value, present, axis_name, None)
    if local_only or groups is not None:
        stats = worst(stats, axis_name)
    return value, stats


def _check_arrays(student_logits, labels, mask, num_classes):
    """Checks what all terms share; returns the labels, the masks and num_classes."""
    if student_logits.ndim != 2:
        raise ValueError(
            "student_logits must have shape [n, k] or [n, t, k], got "
            f"{list(student_logits.shape)}"
        )
    n, k = student_logits.shape
    num_classes = k if num_classes is None else num_classes
    mask = read_masks(mask, n)
    labels = without_labels(jnp.asarray(labels), mask.samples)
    if is_soft(labels):
        labels = check_targets(labels, n, k)
    else:
        check_labels(labels, n, num_classes=num_classes, rows_of="student_logits")
    return labels, mask, num_classes


def distill_loss(
    student_features: Features,
    teacher_features: Features | None,
    labels: jax.Array,
    student_logits: jax.Array,
    teacher_logits: jax.Array | None = None,
    *,
    distance: str | Distance | Callable[..., jax.Array] | Term | Sequence[Term],
    weight: float | jax.Array | None = None,
    normalization: str | None = None,
    task_weight: float | jax.Array = 1.0,
    task: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    mask: Mask = None,
    teacher_data: Mapping[str, jax.Array] = NOTHING,
    key: jax.Array | None = None,
    num_classes: int | None = None,
    axis_name: str | None = None,
    group_size: int | None = None,
    predicted_labels: bool = False,
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
    distances have no second derivatives.  Not for: raw features with a weight that was
    chosen for other features; pass ``normalization``, and a weight that was chosen with
    it.

    Args:
      student_features: shape ``[n, d]``, or a mapping from layer name to array.  In a
        mapping, a Term without layers compares ``"features"``; see `Term` for maps and
        tokens.
      teacher_features: the teacher's features of the same images, in the same form.
        None if no distance compares features of the batch.
      labels: int, shape ``[n]``.  Samples with a negative label are ignored by the
        cross-entropy and by distances that take labels; other distances use them.  Soft
        labels are float, ``[n, k]``, a probability for each class; distances that take
        labels use the most probable class, and a row of zeros means no label.
      student_logits: shape ``[n, k]``.  With ``[n, t, k]``, as of a language model,
        every token is a sample: labels, logits and compared layers start with ``[n,
        t]``, and the mask is ``[n, t]`` or ``[n]``.
      teacher_logits: shape ``[n, k]``.  Distances of predictions and the layer
        ``"logits"`` need them.
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
        position.  To leave out tokens of layers ``[n, t, c]``, pass a mapping from the
        names of these layers to masks ``[n, t]``.  An entry is for the student's layer
        and for the teacher's layer of that name; a layer without an entry is not
        masked.  Pooling averages the tokens that are left; with ``positions="each"``,
        a sample is a token that is left on both sides.  A term ignores samples of which
        no token is left in one of its layers.  The entry ``"samples"``, shape ``[n]``,
        is the mask of samples; without it, those are samples that have a token left in
        some layer of the mapping, also for the cross-entropy and for other layers.
      teacher_data: mapping from name to array, for distances that need other arrays
        computed from the teacher, such as ``{"class_cost": ...}`` for ``"wkd_logits"``,
        or a `Bank` for each ``Term(..., bank=name)``.  The arrays must be equal on all
        devices and get no gradient.
      key: random key; only random distances need it.
      num_classes: number of classes; None takes that of the logits. Labels that are not
        traced are checked against it; `cw2_gaussian` and `ckl_gaussian` use it to
        compute large batches by class.
      axis_name: name of the mapped axis over which the batch is split.
      group_size: number of neighbouring devices along the axis that form a group.
        None computes the distance of the global batch.
      predicted_labels: if True, samples without a label have the class of the largest
        of ``teacher_logits`` in distances that take labels.  The task still ignores
        them.
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
    terms = as_terms(distance)
    check_options(distance, options)
    check_normalization(normalization)
    lam = lambda_of(weight, distance, normalization)
    check_number("task_weight", task_weight, positive=False)
    student_logits = jnp.asarray(student_logits)
    if student_logits.ndim == 3:
        student = student_logits, _by_layer(student_features, None)
        teacher = teacher_logits, _by_layer(teacher_features, None)
        student, teacher, labels, mask = all_tokens(student, teacher, labels, mask)
        student_logits, student_features = student
        teacher_logits, teacher_features = teacher
    labels, read, num_classes = _check_arrays(student_logits, labels, mask, num_classes)
    (student_logits,) = masks.zeroed(read.samples, student_logits)
    networks = {
        "student": _by_layer(student_features, student_logits),
        "teacher": _by_layer(teacher_features, teacher_logits),
    }
    check_tokens(read.tokens, networks)
    n = len(student_logits)
    reads = any("labels" in get_distance(term.distance).inputs for term in terms)
    predicts = predicted_labels and reads
    soft = {"targets": labels} if is_soft(labels) or predicts else {}
    labels = class_labels(labels)
    if predicts:
        labels = predict_labels(labels, teacher_logits, student_logits, read.samples)

    local = {
        "mask": read.samples,
        "tokens": read.tokens,
        **{side: _compared(of, terms, side, n) for side, of in networks.items()},
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
        row, name = get_distance(term.distance), term_name(term)
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
