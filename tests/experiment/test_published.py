"""Tests published methods of several terms: what they sum, and that they train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import SMALL, call, results_of

from kddm_jax import DISTANCES, distill_loss
from kddm_jax.experiment import choose_weights
from kddm_jax.experiment.machine import records
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.published import PUBLISHED
from kddm_jax.experiment.recipes import parse
from kddm_jax.experiment.report import embedding, table
from kddm_jax.experiment.training import methods, models
from kddm_jax.experiment.training.lookup import weight_of

of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def network(width, blocks):
    """Returns shapes like those of a ResNet of four stages."""
    maps = {"stem": of(8, 8, 8, width)}
    for stage, count in enumerate(blocks):
        side = 8 // 2**stage
        layer = of(8, side, side, width * 2**stage)
        maps |= {f"stage{stage + 1}_block{b + 1}": layer for b in range(count)}
    return {
        "features": of(8, 8 * width),
        "logits": of(8, 10),
        "maps": maps,
        "modules": ("fc",),
    }


WIDE = network(2, (1, 1))  # the last maps are 4 x 4
STUDENT, TEACHER = network(2, (1, 2, 1, 1)), network(3, (1, 3, 2, 1))


def make(name, *line, student=STUDENT, teacher=TEACHER):
    settings = parse(["--dataset", "digits", "--distances", name, *line])
    method = methods.make(settings, name, student, teacher)
    methods.check(name, method, student, teacher, 8)
    return method


@pytest.mark.parametrize(
    ("network", "layer"), [("WRN16x2", "stage2_block2"), ("VGG8", "block3")]
)
def test_fitnet_has_repdistillers_layers(network, layer):
    """Compares with f2 of wrn.py and vgg.py, whose first block is the zeroth."""
    model = models.build(network, num_classes=10, width=4)
    shapes = models.shapes(network, model, (8, 8, 1), 8)
    (term,) = make("fitnet", student=shapes, teacher=shapes).distance
    assert term.layers == (layer, layer)


def test_fitnet_is_the_mean_squared_difference_at_the_second_stage():
    method = make("fitnet", "--normalization", "unit")
    (term,) = method.distance
    assert term.layers == ("stage2_block2", "stage2_block3")
    assert {*method.projectors} == {"stage2_block2"}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 8, 4, 4, 6)).astype(np.float32)
    loss, _ = distill_loss(
        *({term.layers[0]: x}, {term.layers[1]: y}),
        *(np.arange(8), np.zeros((8, 10), np.float32)),
        **{"distance": method.distance, "weight": 1.0, "task_weight": 0.0},
        **method.options,
    )
    np.testing.assert_allclose(loss, 100 * np.mean((x - y) ** 2), rtol=1e-5)


def test_fitnet_of_a_network_without_stages_takes_half_the_depth():
    maps = {f"block{i}": of(8, 2, 2, 6) for i in range(1, 9)}
    vit = {**network(2, (1, 1)), "maps": maps, "features": of(8, 6)}
    (term,) = make("fitnet", student=vit, teacher=vit).distance
    assert term.layers == ("block4", "block4")


def test_wkd_compares_predictions_and_the_last_maps():
    method = make("wkd")
    logits, maps = method.distance
    assert (logits.weight, maps.weight) == (1.0, 1.0)
    assert dict(logits.options) == {"gamma": 10.0}
    assert dict(maps.options) == {"grid": 1}  # maps of 1 x 1
    _, wide = make("wkd", student=WIDE, teacher=network(3, (1, 1))).distance
    assert dict(wide.options) == {"grid": 4}
    assert maps.layers == ("stage4_block1", "stage4_block1")
    assert {*method.projectors} == {"stage4_block1"}
    assert methods.needed_arrays("wkd") == ("class_cost",)


@pytest.mark.parametrize("width", [2, 3])
def test_kdpp_projects_features_only_if_their_widths_differ(width):
    method = make("kd++", student=network(width, (1, 1)))
    assert [t.weight for t in method.distance] == [2.5, 1.0]
    assert dict(method.distance[0].options) == {"temperature": 1.0}
    assert {*method.projectors} == ({"features"} if width == 2 else set())
    assert methods.needed_arrays("kd++") == ("class_means",)


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_settings_do_not_change_a_published_method(name):
    line = ("--normalization", "unit", "--projector", "dense", "--positions", "each")
    changed = make(name, *line, "--layers", "stem:stem")
    assert changed == make(name)
    assert changed.options == {"normalization": None}
    settings = parse(["--dataset", "digits", "--distances", name])
    assert weight_of(settings, name) == 1.0
    given = ["--dataset", "digits", "--distances", name, "--weights", name, "0.5"]
    assert weight_of(parse(given), name) == 0.5
    assert methods.digest(name) == PUBLISHED[name].version
    assert not methods.normalizes(name)
    assert not embedding.ties_axes(name, settings)
    assert {*PUBLISHED[name].distances} <= {*DISTANCES}
    assert len(changed.distance) == len(PUBLISHED[name].distances)


def test_distance_of_a_published_method_is_the_sum_of_its_terms():
    names = [term.name for term in make("kd++").distance]
    record = {**dict(zip(names, (1.0, 2.0), strict=True)), "loss": 5.0}
    assert records.distance_of(record, "kd++") == 3.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_method_is_no_part_of_a_sum(name):
    with pytest.raises(UserError, match="is a whole method, not a distance"):
        parse(["--dataset", "digits", "--distances", f"l2+{name}"])
    with pytest.raises(UserError, match="is a whole method, not a distance"):
        parse(["--dataset", "digits", "--distances", f"{name}+l2"])


@pytest.mark.parametrize("name", ["fitnet", "wkd"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_network_without_maps_is_refused(name, who):
    bare = {**STUDENT, "maps": {"hidden": of(8, 16)}}
    with pytest.raises(
        UserError, match=f"{name} compares maps .*, but the {who} has non"
    ):
        make(name, **{who: bare})


@pytest.mark.slow
def test_published_methods_train(tmp_path, capsys):
    line = (*SMALL, "--distances", *PUBLISHED, "--views", 2, "--epochs", 3)
    line = (*line, "--width", 2, "--teacher-width", 3, "--compilation-cache", "None")
    assert call(*line, "--out", tmp_path / "out") == 0
    found = results_of(tmp_path / "out")
    for run in found["runs"][1:]:
        distances = [records.distance_of(r, run["name"]) for r in run["history"]]
        assert distances[-1] < distances[0], run["name"]
    titles = [row[0] for row in table.table(found)]
    assert titles[-3:] == ["FitNet", "WKD", "KD++"]
    capsys.readouterr()
    # λ multiplies all terms, and is tuned like that of a distance.
    tune = [*map(str, line), "--held-out", "100", "--seeds", "0", "1"]
    tune += ["--distances", "fitnet", "--out", str(tmp_path / "tune")]
    assert choose_weights.main(["--grid", "0.1", "1", "--", *tune]) == 0
    assert "fitnet" in capsys.readouterr().out
