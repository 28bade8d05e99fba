"""Turns a method's name into the loss of the train step, and into projectors.

A method is a key of the catalogue, a user's distance as ``module:NAME``, a sum of these
joined by ``+``, a published method of several terms (`published`), or ``feature_only``,
in which labels do not train the backbone (arXiv 2511.14981).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kddm_jax import DISTANCES, Bank, Distance, Term, distill_loss
from kddm_jax.experiment.checks import layer_pairs
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.settings import (
    FEATURE_ONLY,
    RELEASED,
    Settings,
    by_quality,
    change,
    parts_of,
)
from kddm_jax.experiment.training import models
from kddm_jax.experiment.training.lookup import find, weight_of
from kddm_jax.networks.projectors import (
    PROJECTORS,
    add_projectors,
    init_projectors,
    projected_apply,
)
from kddm_jax.terms import term_name

# The students' layers in the paper; other networks use four evenly spaced layers.
STUDENT_LAYERS = {
    "ResNet9": tuple(f"stage{stage}_block1" for stage in (1, 2, 3, 4)),
    "MobileNetV2": ("block3", "block6", "block13", "block17"),
    "ViT": ("block2", "block4", "block6", "block8"),
}
COUNT = 4
OF_TEACHER = ("class_cost", "class_means")
BANK = "bank"  # name of the statistics of a teacher in `teacher_data`
POOLED = ("features", "features", 1.0)
# Changes with the loss, so that runs of older losses are others.
FEATURE_ONLY_LOSS = "2"
# The modules after the features; "fc" in other networks.
HEADS = {"MobileNetV2": ("classifier_1",), "ViT": ("heads_head",)}
Shapes = Mapping[str, Any]  # from models.shapes


@dataclass(frozen=True)
class Method:
    """Contains the arguments of the train step for a method.

    Attributes:
      distance: an entry of the catalogue or Terms, as in `distill_loss`; the weights of
        Terms are relative to the run's lambda.
      options: options of `distill_loss`.
      projectors: a module for each student layer that is projected.
      head: the only modules of the student that labels train; None trains all of them.
    """

    distance: Any = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    projectors: Mapping[str, nn.Module] = field(default_factory=dict)
    head: tuple[str, ...] | None = None


def entries(name: str) -> tuple[Distance, ...]:
    """Returns the distances that a method sums; none for feature_only."""
    if name == FEATURE_ONLY:
        return ()
    parts = PUBLISHED[name].distances if name in PUBLISHED else parts_of(name)
    return tuple(map(find, parts))


def needed_arrays(name: str) -> tuple[str, ...]:
    """Returns the arrays made from the teacher that a method needs, by name."""
    inputs = {kind for row in entries(name) for kind in row.inputs}
    return tuple(array for array in OF_TEACHER if array in inputs)


def normalizes(name: str) -> bool:
    """Returns whether ``--normalization`` changes the features of a method."""
    if name == FEATURE_ONLY:
        return True
    return name not in PUBLISHED and any("features" in r.inputs for r in entries(name))


def is_zero(name: str, normalization: str | None) -> bool:
    """Returns whether a normalization makes equal all that a distance compares.

    For a sum of distances: whether it does so for one of them, which is then refused.
    """
    if len(parts_of(name)) > 1:
        return any(is_zero(part, normalization) for part in parts_of(name))
    if name == FEATURE_ONLY or not normalizes(name):
        return False
    row = find(name)
    try:
        row.check_normalization(name, normalization, dict(row.options))
    except ValueError:
        return True
    return False


def digest(name: str) -> str | None:
    """Hashes the file of a user's distance, because an edited one is another run."""
    if name == FEATURE_ONLY:
        return FEATURE_ONLY_LOSS
    if name in PUBLISHED:
        return PUBLISHED[name].version
    if name in DISTANCES:
        return None
    if len(parts_of(name)) > 1:
        return "+".join(filter(None, map(digest, parts_of(name)))) or None
    find(name)
    return models.source_digest(name)


def title(name: str) -> str:
    """Returns the name of a method in tables."""
    if name == FEATURE_ONLY:
        return "features only"
    if name in PUBLISHED:
        return PUBLISHED[name].title
    return " + ".join(find(part).title or part for part in parts_of(name))


def layers_of(shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns all layers of a network by depth, pooled features last."""
    return {**shapes["maps"], "features": shapes["features"]}


def _projector(kind: str, x, y) -> nn.Module:
    """Builds a projector from a student's layer to a teacher's."""
    if len(x.shape) < 4:
        return PROJECTORS["dense"](y.shape[-1])
    kind = "conv" if kind == "dense" else kind  # the same linear map of each position
    grid = tuple(y.shape[1:3]) if len(y.shape) == 4 else (1, 1)
    options = {"axis_name": "batch"} if kind == "conv3" else {}
    return PROJECTORS[kind](y.shape[-1], grid=grid, **options)


def check_layer(option: str, who: str, name: str, shapes: Shapes):
    """Returns the shape of a layer; raises a `UserError` if the network has none."""
    layers = {**layers_of(shapes), "logits": shapes["logits"]}
    if name not in layers:
        raise UserError(
            f"{option}: the {who} has no layer {name!r}; it has {', '.join(layers)}"
        )
    return layers[name]


def _terms(settings, chosen, make_term, x: Shapes, y: Shapes):
    """Makes a term for each pair of layers, and the projectors that they need."""
    terms, projectors = [], {}
    for student, teacher, weight in chosen:
        of_student = check_layer("--layers", "student", student, x)
        of_teacher = check_layer("--layers", "teacher", teacher, y)
        terms.append(make_term(student, teacher, weight, of_teacher))
        if settings.method.projector is not None and student != "logits":
            kind = settings.method.projector
            projectors[student] = _projector(kind, of_student, of_teacher)
    return tuple(terms), projectors


def _named(row, name):
    """Renames a distance, so that its value is recorded under the method's name."""
    if name in DISTANCES:
        return name
    fn = functools.wraps(row.fn)(lambda *arrays, **options: row.fn(*arrays, **options))
    fn.__name__ = name
    return replace(row, fn=fn)


def make(
    settings: Settings,
    name: str,
    student: Shapes,
    teacher: Shapes,
) -> Method:
    """Makes a method for two networks.

    Args:
      settings: the settings of the command.
      name: name of the method.
      student: shapes of the student's layers.
      teacher: shapes of the teacher's layers.

    Returns:
      The method. In a sum of distances, each Term's weight includes the lambda of its
      distance, so that the run's lambda is 1.

    Raises:
      UserError: a network does not have a layer of ``--layers``.
    """
    if settings.networks.teacher_statistics is not None:
        return _against_statistics(settings, name, student, teacher)
    if name == FEATURE_ONLY:
        return _feature_only(settings, student, teacher)
    if name in PUBLISHED:
        return _published(name, student, teacher)
    if len(parts_of(name)) > 1:
        return _sum(settings, name, student, teacher)
    row = find(name)
    options = {"normalization": settings.method.normalization}
    layered = {"features", "maps"} & set(row.inputs)
    if by_quality(settings):
        if layered:
            raise UserError(
                f"--layers {RELEASED} is for {FEATURE_ONLY}, not for {name}; put "
                f"{name} into another command"
            )
        return Method(_named(row, name), options)
    chosen = layer_pairs(settings)
    others = [layer for _, layer, _ in chosen if layer != "features"]
    if others and "class_means" in row.inputs:
        raise UserError(
            f"{name} compares with class means of the teacher's pooled features, but "
            f"--layers names {others[0]}; leave --layers out"
        )
    if not chosen and "maps" in row.inputs:  # the last maps of both networks
        for who, shapes in (("student", student), ("teacher", teacher)):
            if not shapes["maps"]:
                raise UserError(
                    f"distance {name} compares maps, but the {who} has none; choose a "
                    "distance of features, or return maps"
                )
        chosen = [(list(student["maps"])[-1], list(teacher["maps"])[-1], 1.0)]
    if not layered or not (chosen or settings.method.projector):
        return Method(_named(row, name), options)

    def term(of_student, of_teacher, share, _):
        return Term(
            row,
            weight=share,
            layers=(of_student, of_teacher),
            name=name if len(chosen) < 2 else f"{name}@{of_student}",
            positions=settings.method.positions if "features" in row.inputs else "pool",
        )

    chosen = chosen or [("features", "features", 1.0)]
    terms, projectors = _terms(settings, chosen, term, student, teacher)
    return Method(terms, options, projectors)


def _against_statistics(settings, name, student, teacher):
    """Makes a method that compares pooled features with statistics of a teacher."""
    whole = name == FEATURE_ONLY or name in PUBLISHED
    if whole or settings.method.layers:
        what = name if whole else "--layers"
        raise UserError(
            f"{what} compares features of the same images, but --teacher-statistics "
            "holds none; leave it out"
        )
    terms, projectors, parts = [], {}, parts_of(name)
    for part in parts:
        factor = weight_of(settings, part) if len(parts) > 1 else 1.0
        row = find(part)
        if part in DISTANCES and "sizes" not in row.promises:
            able = [key for key, one in DISTANCES.items() if "sizes" in one.promises]
            raise UserError(
                f"{part} needs the teacher's outputs on the same images; with "
                f"--teacher-statistics take {', '.join(able)}"
            )
        terms.append(Term(row, weight=factor, name=part, bank=BANK))
    if settings.method.projector is not None:
        layer = student["features"], teacher["features"]
        projectors = {"features": _projector(settings.method.projector, *layer)}
    options = {"normalization": settings.method.normalization}
    return Method(tuple(terms), options, projectors)


def _published(name, student, teacher):
    """Makes a published method, whose terms name their layers and projectors."""
    terms, projectors = [], {}
    x, y = layers_of(student), layers_of(teacher)
    for term, kind in PUBLISHED[name].terms(student, teacher):
        terms.append(replace(term, name=f"{name}@{term_name(term)}"))
        if kind is not None:
            of_student, of_teacher = term.layers or POOLED[:2]
            projectors[of_student] = _projector(kind, x[of_student], y[of_teacher])
    return Method(tuple(terms), {"normalization": None}, projectors)


def _pooled(settings, student, teacher):
    """Returns settings that project the pooled features only if their widths differ."""
    same = student["features"].shape[-1] == teacher["features"].shape[-1]
    kind = None if same else settings.method.projector or "dense"
    return change(settings, projector=kind)


def _sum(settings, name, student, teacher):
    """Makes the sum of several distances, each times its own lambda."""
    terms, projectors = [], {}
    for part in parts_of(name):
        method = make(settings, part, student, teacher)
        own = method.distance
        own = own if isinstance(own, tuple) else (Term(own, name=part),)
        factor = weight_of(settings, part)
        terms += [replace(term, weight=factor * term.weight) for term in own]
        projectors |= method.projectors
    options = {"normalization": settings.method.normalization}
    return Method(tuple(terms), options, projectors)


def _feature_only(settings, student, teacher):
    """Makes the loss (lambda / K) sum_k D(projected student, teacher) of K layers.

    D is the mean squared error, or the squared distance of features of unit length,
    which is 2 - 2 cos.  Labels train the head only.
    """
    chosen, unit = layer_pairs(settings), settings.method.normalization == "unit"
    if not chosen:
        chosen, settings = [POOLED], _pooled(settings, student, teacher)

    def term(of_student, of_teacher, share, layer):
        # l2 sums over channels.  Features of unit length have the same sum in any
        # width; of others the method averages over all elements.
        return Term(
            "l2",
            weight=share / len(chosen) / (1 if unit else layer.shape[-1]),
            layers=(of_student, of_teacher),
            name=f"{FEATURE_ONLY}@{of_student}",
            positions="each",
        )

    if any(pair[0] == "logits" for pair in chosen):
        raise UserError(
            f"{FEATURE_ONLY} detaches the student's logits from its backbone, so that "
            "they cannot teach it; take other --layers"
        )
    terms, projectors = _terms(settings, chosen, term, student, teacher)
    head = settings.method.head or HEADS.get(settings.networks.student_model, ("fc",))
    if missing := sorted(set(head) - set(student["modules"])):
        raise UserError(
            f"feature_only: the student has no module {', '.join(missing)}; name its "
            f"head by --head, among {', '.join(student['modules'])}"
        )
    options = {"normalization": settings.method.normalization}
    return Method(terms, options, projectors, head=tuple(head))


def student_layers(settings: Settings, student: Shapes) -> tuple[str, ...]:
    """Returns the student's layers of ``--layers released``, from first to last."""
    if settings.networks.student_model in STUDENT_LAYERS:
        return STUDENT_LAYERS[settings.networks.student_model]
    own = [layer for layer in student["maps"] if layer != "stem"]
    if len(own) < COUNT:
        return tuple(own)
    return tuple(own[(i + 1) * len(own) // COUNT - 1] for i in range(COUNT))


def released(settings: Settings, layers: Sequence[str]) -> Settings:
    """Returns the settings of arXiv 2511.14981: chosen layers, not normalized."""
    return change(settings, layers=tuple(layers), normalization=None)


def check_choice_of_layers(settings: Settings, student: Shapes, teacher: Shapes):
    """Checks before training that any choice of layers by quality will work."""
    own, known = student_layers(settings, student), teacher["maps"]
    if not own:
        raise UserError(
            f"--layers {RELEASED}: the student has no maps; leave out --layers to "
            "compare pooled features"
        )
    if len(known) < len(own):
        raise UserError(
            f"--layers {RELEASED}: the teacher has {len(known)} layers, the student "
            f"follows {len(own)}; name the pairs by --layers"
        )
    widths = {known[name].shape[-1] for name in known}
    widths |= {student["maps"][name].shape[-1] for name in own}
    if settings.method.projector is None and len(widths) > 1:
        raise UserError(
            f"--layers {RELEASED}: layers have widths {sorted(widths)}; pass "
            "--projector conv"
        )
    chosen = [f"{a}:{b}" for a, b in zip(own, list(known)[-len(own) :], strict=True)]
    _feature_only(released(settings, chosen), student, teacher)


def check(
    name: str,
    method: Method,
    student: Shapes,
    teacher: Shapes,
    batch: int,
    bank: Bank | None = None,
) -> None:
    """Traces a method on the real shapes, to find errors before any training.

    Args:
      name: name of the method.
      method: the method.
      student: shapes of the student's layers.
      teacher: shapes of the teacher's layers.
      batch: size of a batch.
      bank: statistics of a teacher, if the method compares with them.

    Raises:
      UserError: the method does not work with these layers.
    """

    def loss(x, y, s, t, labels, teacher_data):
        return distill_loss(
            x, y, labels, s, t,
            distance=method.distance, weight=1.0, teacher_data=teacher_data,
            key=jax.random.key(0), **method.options,
        )  # fmt: skip

    x, y = layers_of(student), layers_of(teacher)
    try:
        for layer, projector in method.projectors.items():
            x[layer] = jax.eval_shape(
                lambda a, p=projector: p.init_with_output(jax.random.key(0), a)[0],
                x[layer],
            )
        labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
        logits = student["logits"], teacher["logits"]
        cost = jax.ShapeDtypeStruct((logits[0].shape[-1],) * 2, jnp.float32)
        means = jax.ShapeDtypeStruct(
            (cost.shape[0], *y["features"].shape[1:]), jnp.float32
        )
        known = {"class_cost": cost, "class_means": means, BANK: bank}
        jax.eval_shape(loss, x, y, *logits, labels, known)
    except (ValueError, TypeError) as error:
        text = str(error).splitlines()[0]
        fix = ", that is --projector" if "projectors" in text else ""
        terms = method.distance if isinstance(method.distance, tuple) else ()
        if fix and any(term.layers and term.layers[0] == "logits" for term in terms):
            fix = "; logits are not projected, so name a layer of their width"
        raise UserError(f"distance {name}: {text}{fix}") from error


def with_projectors(method: Method, variables, key: jax.Array, student: Shapes):
    """Adds the variables of the method's projectors to the student's.

    Args:
      method: the method of training.
      variables: variables of the student.
      key: random key of the projectors' parameters.
      student: shapes of the student's layers.

    Returns:
      The variables for the function of `apply_of`; unchanged without projectors.
    """
    if not method.projectors:
        return variables
    own = init_projectors(key, method.projectors, dict[str, Any](layers_of(student)))
    return jax.device_get(add_projectors(variables, own))


def teacher_layers(method: Method) -> tuple[str, ...]:
    """Returns the names of the teacher's maps that a method compares."""
    if not isinstance(method.distance, tuple):
        return ()
    layers = {term.layers[1] for term in method.distance if term.layers}
    return tuple(sorted(layers - {"features", "logits"}))


def apply_of(method: Method, apply: Callable) -> Callable:
    """Adds the method's projectors to the student's apply function."""
    return projected_apply(apply, method.projectors) if method.projectors else apply
