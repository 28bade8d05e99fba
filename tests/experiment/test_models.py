"""Tests users' networks in the command: Linen and NNX, with random layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
from commands import SMALL, call, results_of
from flax import nnx

from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.training import models

NNX, DROPPED = "small_network:SmallNNX", "small_network:Dropped"
OPTIONS = {"num_classes": 3, "width": 2, "axis_name": None, "stem": "cifar"}


def test_an_nnx_network_is_made_anew_from_each_key():
    model = models.build(NNX, **OPTIONS)
    assert model == models.build(NNX, **OPTIONS)  # share compiled programs
    assert hash(model) == hash(models.build(NNX, **OPTIONS))
    assert model != models.build(NNX, **{**OPTIONS, "width": 3})
    found = models.shapes(NNX, model, (8, 8, 1), 2)
    assert found["logits"].shape == (2, 3)
    assert found["maps"]["map"].shape == (2, 2, 2, 4)
    assert found["modules"] == ("fc", "first", "norm")
    draw = jax.jit(model.init)
    one, other = (
        draw(jax.random.key(seed), jnp.zeros((1, 8, 8, 1))) for seed in (0, 1)
    )
    assert np.any(one["params"]["fc"]["kernel"] != other["params"]["fc"]["kernel"])
    images = jnp.ones((2, 8, 8, 1))
    outputs, _ = models.network_apply(model)(one, images, train=False)
    module = model.module(jax.random.key(0))
    module.eval()
    np.testing.assert_allclose(outputs.logits, module(images).logits, rtol=1e-5)


def test_an_nnx_network_needs_rngs(monkeypatch):
    fixed = lambda num_classes: nnx.Linear(2, num_classes, rngs=nnx.Rngs(0))
    monkeypatch.setattr(small_network, "fixed", fixed, raising=False)
    with pytest.raises(UserError, match="does not take rngs; add the argument"):
        models.build("small_network:fixed", **OPTIONS)


@pytest.mark.slow
def test_networks_with_random_layers_are_trained(tmp_path, capsys):
    line = (*SMALL, "--teacher-model", NNX, "--distances", "l2", "--layers", "map:map")
    for student in (NNX, DROPPED):
        out = tmp_path / student.partition(":")[2]
        options = ("--student-model", student, "--out", out, "--devices", 2)
        status = call(*line, *options)
        assert (status, capsys.readouterr().err) == (0, "")
        found = results_of(out)
        assert {run["name"] for run in found["runs"]} == {"student", "l2"}
        for run in found["runs"]:
            assert all(np.isfinite(epoch["loss"]) for epoch in run["history"])
