"""Tests weights with other names, in wrappers, or without a head."""

import jax
import numpy as np
import pytest

from kddm_jax.experiment.training import pretrained
from kddm_jax.networks import surgery, torchvision, weights
from kddm_jax.networks.torchvision import Architecture, WeightsError

SMALL = Architecture((1, 1, 1, 1), "cifar", width=4, num_classes=5)
DRAW = np.random.default_rng(0).standard_normal
VARIABLES = jax.tree.map(lambda leaf: DRAW(leaf.shape).astype("f4"), SMALL.shapes())
TENSORS = torchvision.to_torchvision(VARIABLES)
HEADLESS = {k: v for k, v in TENSORS.items() if not k.startswith("fc.")}
# Written by hand: a stage of one block, as in ResNet9, in transformers' modules.
BLOCK = {"conv1": "layer.0.convolution", "bn1": "layer.0.normalization"}
BLOCK |= {"conv2": "layer.1.convolution", "bn2": "layer.1.normalization"}
BLOCK |= {"downsample.0": "shortcut.convolution"}
BLOCK |= {"downsample.1": "shortcut.normalization"}
STEM = {"conv1": "embedder.convolution", "bn1": "embedder.normalization"}


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def transformers_name(name, inside="resnet."):
    module, leaf = name.rsplit(".", 1)
    if module == "fc":
        return f"classifier.1.{leaf}"
    if module in STEM:
        return f"{inside}embedder.{STEM[module]}.{leaf}"
    stage, block, part = module.split(".", 2)
    stage = int(stage.removeprefix("layer")) - 1
    return f"{inside}encoder.stages.{stage}.layers.{block}.{BLOCK[part]}.{leaf}"


def kuangliu_name(name):
    return name.replace("downsample", "shortcut").replace("fc.", "linear.")


def renamed(tensors, function):
    return {function(name): tensor for name, tensor in tensors.items()}


def prefixed(tensors, prefix):
    return renamed(tensors, lambda name: prefix + name)


PROJECTION = {f"{i}.{leaf}": np.ones((3, 3)) for i in (0, 2) for leaf in ("weight",)}
WHOLE = {
    "torchvision, timm": TENSORS,
    "transformers": renamed(TENSORS, transformers_name),
    "transformers, DataParallel": prefixed(
        renamed(TENSORS, transformers_name), "module."
    ),
    "kuangliu": renamed(TENSORS, kuangliu_name),
    "kuangliu, DataParallel": prefixed(renamed(TENSORS, kuangliu_name), "module."),
    "module.": prefixed(TENSORS, "module."),
    "torch.compile": prefixed(TENSORS, "_orig_mod."),
    "Lightning": prefixed(TENSORS, "model."),
    "with a teacher beside": {
        **prefixed(TENSORS, "student."),
        "criterion.weight": np.ones(3),
    },
}
PARTS = {
    "no head": HEADLESS,
    "backbone.": prefixed(HEADLESS, "backbone."),
    "backbone and projection": {
        **prefixed(HEADLESS, "backbone."),
        **prefixed(PROJECTION, "projection_head.layers."),
    },
    "backbone and a linear head": {
        **prefixed(HEADLESS, "backbone."),
        "head.weight": np.ones((5, 32)),
    },
    "module.backbone.": {
        **prefixed(HEADLESS, "module.backbone."),
        "module.queue": np.ones((3, 3)),
    },
    "projection in place of the head": {**HEADLESS, **prefixed(PROJECTION, "fc.")},
    "projector": {**HEADLESS, **prefixed(PROJECTION, "projector.")},
    "transformers' ResNetModel": renamed(
        HEADLESS, lambda name: transformers_name(name, "")
    ),
    "kuangliu": renamed(HEADLESS, kuangliu_name),
}


@pytest.mark.parametrize("name", WHOLE)
def test_names_of_others(name):
    assert_same(torchvision.from_torchvision(WHOLE[name]), VARIABLES)


@pytest.mark.parametrize("name", PARTS)
def test_weights_without_a_head(name):
    found = torchvision.from_torchvision(PARTS[name])
    backbone = {k: v for k, v in VARIABLES["params"].items() if k != "fc"}
    assert_same(found, {**VARIABLES, "params": backbone})


def test_a_head_is_added():
    found = torchvision.from_torchvision(HEADLESS)
    known = torchvision.architecture(found)
    assert known == SMALL._replace(num_classes=0)
    assert str(known).endswith("no head")
    with pytest.raises(WeightsError, match="have no head; add one by .*replace_head"):
        known.model()
    whole = surgery.replace_head(jax.random.key(0), found, 7)
    assert torchvision.architecture(whole) == SMALL._replace(num_classes=7)
    assert set(torchvision.to_torchvision(found)) == set(HEADLESS)
    grown = surgery.grow(jax.random.key(0), found, (2, 2, 2, 2))
    assert torchvision.architecture(grown).name == "ResNet18"


def test_the_command_draws_a_head(tmp_path):
    path = tmp_path / "backbone.npz"
    np.savez(path, **PARTS["backbone."])
    model = SMALL._replace(num_classes=7).model()
    start = pretrained.load("--pretrained-student", path, model, SMALL.channels)
    assert "no head: one is drawn for 7 classes" in str(start)
    assert torchvision.architecture(start.variables_of(0)).num_classes == 7


def test_a_file_without_a_head_becomes_another(tmp_path):
    path, copy = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(path, **PARTS["transformers' ResNetModel"])
    assert str(weights.convert(path, copy)).endswith("no head")
    assert_same(weights.load(copy), weights.load(path))


def test_several_networks_are_named():
    both = {**prefixed(HEADLESS, "encoder_q."), **prefixed(HEADLESS, "encoder_k.")}
    with pytest.raises(WeightsError, match="several networks: encoder_k, encoder_q;"):
        torchvision.from_torchvision(both)


# Files of networks that are not known here, and the tensor that shows it.
OTHERS = {
    "timm's deep stem": (
        {**HEADLESS, "conv1.0.weight": np.ones((4, 3, 3, 3))},
        ("conv1.weight",),
        "conv1.weight is not in",
    ),
    "squeeze and excitation": (
        {**TENSORS, "layer1.0.se.fc1.weight": np.ones((2, 2, 1, 1))},
        (),
        "layer1.0.se.fc1.weight is not expected",
    ),
    "transformers' ResNet50": (
        {
            **WHOLE["transformers"],
            "resnet.encoder.stages.0.layers.0.layer.2.convolution.weight": np.ones(1),
        },
        (),
        r"blocks of three convolutions \(ResNet50",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_refused(name):
    tensors, gone, message = OTHERS[name]
    tensors = {k: v for k, v in tensors.items() if k not in gone}
    with pytest.raises(WeightsError, match=message):
        torchvision.from_torchvision(tensors)


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model", "net"])
def test_wrappers_of_training_scripts(wrap):
    saved = {wrap: TENSORS, "epoch": 3, "optimizer": {"state": {}}}
    assert weights._unwrapped(saved) is TENSORS
    assert weights._unwrapped({"state_dict": saved}) is TENSORS
    assert weights._unwrapped(TENSORS) is TENSORS
