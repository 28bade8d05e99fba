"""Tests that weights with torchvision's names become variables, and back."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kddm_jax import checkpoint, train_step
from kddm_jax.adapters import linen_apply
from kddm_jax.networks import surgery, torchvision, weights
from kddm_jax.networks.torchvision import Architecture, WeightsError
from kddm_jax.resnet import ResNet9, ResNet18, ResNet34

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = Architecture(blocks=(1, 1, 1, 1), stem="cifar", width=4, num_classes=5)

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or not BENCHMARKS.is_dir(),
    reason='need PyTorch and a checkout (pip install -e ".[bench]")',
)


def random_variables(architecture, seed=0):
    """Makes variables without zeros and ones."""
    rng = np.random.default_rng(seed)

    def leaf(of):
        if len(of.shape) == 1:
            return rng.uniform(0.5, 1.5, of.shape).astype(np.float32)
        fan_in = np.prod(of.shape[:-1])
        return rng.normal(0, fan_in**-0.5, of.shape).astype(np.float32)

    return jax.tree.map(leaf, architecture.shapes())


@pytest.fixture(scope="module")
def small():
    return random_variables(SMALL)


def assert_same(left, right):
    """Asserts that structures, dtypes and bytes are equal."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())


@partial(jax.jit, static_argnums=0)
def run(model, variables, images):
    return linen_apply(model)(variables, images, train=False)[0]


def images(size, channels=3, batch=2):
    rng = np.random.default_rng(7)
    return rng.normal(size=(batch, size, size, channels)).astype(np.float32)


# ---------------------------------------------------------------------------
# Names and layouts.


def torchvision_names(blocks):
    """Returns the keys of `state_dict()` of torchvision's networks."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{n}" for n in norm)}
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            for i in (1, 2):
                names |= {f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{n}" for n in norm)}
        if stage > 1:
            at = f"layer{stage}.0.downsample"
            names |= {f"{at}.0.weight", *(f"{at}.1.{n}" for n in norm)}
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "count", "parameters"),
    # Numbers of torchvision's networks: tensors of the state_dict, and parameters.
    [(ResNet18, 122, 11_689_512), (ResNet34, 218, 21_797_672)],
)
def test_names_are_those_of_torchvision(network, count, parameters):
    shapes = Architecture(blocks=network.blocks).shapes()
    variables = jax.tree.map(lambda of: np.zeros(of.shape, of.dtype), shapes)
    tensors = torchvision.to_torchvision(variables)
    assert set(tensors) == torchvision_names(network.blocks)
    assert len(tensors) == count
    trained = [a for name, a in tensors.items() if "running" not in name]
    trained = [a for a in trained if a.dtype == np.float32]
    assert sum(a.size for a in trained) == parameters
    assert tensors["conv1.weight"].shape == (64, 3, 7, 7)
    assert tensors["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert tensors["fc.weight"].shape == (1000, 512)
    assert tensors["bn1.num_batches_tracked"].shape == ()
    assert tensors["bn1.num_batches_tracked"].dtype == np.int64


def test_layouts(small):
    params, stats = small["params"], small["batch_stats"]
    tensors = torchvision.to_torchvision(small)
    block = params["layer2_0"]
    for i, o, h, w in [(0, 0, 0, 0), (1, 5, 2, 0), (3, 2, 0, 1)]:
        weight = tensors["layer2.0.conv1.weight"][o, i, h, w]
        assert weight == block["conv1"]["kernel"][h, w, i, o]
    assert tensors["fc.weight"][4, 30] == params["fc"]["kernel"][30, 4]
    for theirs, ours in {
        "fc.bias": params["fc"]["bias"],
        "bn1.weight": params["bn1"]["scale"],
        "bn1.bias": params["bn1"]["bias"],
        "bn1.running_mean": stats["bn1"]["mean"],
        "layer3.0.downsample.1.running_var": stats["layer3_0"]["downsample_1"]["var"],
    }.items():
        np.testing.assert_array_equal(tensors[theirs], ours)


ARCHITECTURES = [
    SMALL,
    Architecture(width=4),
    Architecture(ResNet34.blocks, stem="cifar", width=2, num_classes=2, channels=1),
    Architecture((1, 3, 2, 1), width=2, num_classes=1),
]


@pytest.mark.parametrize("given", ARCHITECTURES, ids=str)
def test_there_and_back(given):
    variables = random_variables(given)
    tensors = torchvision.to_torchvision(variables)
    found = torchvision.from_torchvision(tensors)
    assert_same(found, variables)
    assert torchvision.architecture(found) == given
    assert_same(torchvision.to_torchvision(found), tensors)
    for tensor in tensors.values():  # required by safetensors and PyTorch
        assert tensor.flags.c_contiguous
        assert tensor.flags.writeable


def test_model_of_an_architecture(small):
    model = torchvision.architecture(small).model()
    assert (model.blocks, model.stem, model.width) == (ResNet9.blocks, "cifar", 4)
    of = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert jax.tree.map(np.shape, of) == jax.tree.map(np.shape, small)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_floats_become_float32(small, dtype):
    tensors = torchvision.to_torchvision(small)
    tensors = {k: v.astype(dtype) if v.ndim else v for k, v in tensors.items()}
    found = torchvision.from_torchvision(tensors)
    rounded = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), small)
    assert_same(found, rounded)


def test_counters_may_be_absent_or_large(small):
    tensors = torchvision.to_torchvision(small)
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]
    assert len(counters) == 12
    more = {**tensors, **dict.fromkeys(counters, np.int64(2**40))}
    assert_same(torchvision.from_torchvision(more), small)
    less = {name: tensors[name] for name in tensors.keys() - set(counters)}
    assert_same(torchvision.from_torchvision(less), small)


def test_a_common_prefix_is_left_out(small):
    tensors = torchvision.to_torchvision(small)
    prefixed = {f"module.net.{name}": tensor for name, tensor in tensors.items()}
    assert_same(torchvision.from_torchvision(prefixed), small)


def test_projectors_are_left_out(small):
    dense = {"dense": {"kernel": np.ones((32, 64), np.float32)}}
    student = {
        "params": {**small["params"], "projectors": dense},
        "batch_stats": {**small["batch_stats"], "projectors": {"bn": {}}},
    }
    assert_same(torchvision.to_torchvision(student), torchvision.to_torchvision(small))
    assert torchvision.architecture(student) == SMALL
    found = surgery.replace_head(jax.random.key(0), student, 3)
    assert set(found["params"]) == set(small["params"])


# ---------------------------------------------------------------------------
# Weights that do not fit: the tensor, what was found, what was expected.


def without(name):
    return lambda tensors: tensors.pop(name)


def with_tensor(name, shape=(4,), dtype=np.float32, value=1):
    return lambda tensors: tensors.update({name: np.full(shape, value, dtype)})


MISTAKES = {
    "missing": (
        without("layer3.0.bn2.running_var"),
        ["layer3.0.bn2.running_var is missing;", "ResNet9, width 4, cifar stem"],
    ),
    "a block missing": (
        lambda tensors: [tensors.pop(k) for k in [*tensors] if k.startswith("layer4")],
        ["layer4.0.bn1.bias is missing (and 14 more)"],
    ),
    "a stage with a gap": (
        lambda tensors: tensors.update(
            {k.replace("1.0", "1.7"): v for k, v in tensors.items() if "layer1" in k}
        ),
        ["layer1.1.bn1.bias is missing (and 9 more)"],
    ),
    "not expected": (
        with_tensor("fc2.bias"),
        ["fc2.bias is not expected;", "5 classes"],
    ),
    "a fifth stage": (with_tensor("layer5.0.conv1.weight"), ["layer5.0", "not exp"]),
    "shape": (
        with_tensor("layer2.0.conv1.weight", (8, 4, 1, 1)),
        ["layer2.0.conv1.weight has shape [8, 4, 1, 1], expected [8, 4, 3, 3]"],
    ),
    "shape of the head": (
        with_tensor("fc.weight", (5, 128)),
        ["fc.weight has shape [5, 128], expected [5, 32]"],
    ),
    "rank": (with_tensor("conv1.weight", (4,)), ["4-d", "conv1.weight", "[4]"]),
    "empty": (with_tensor("conv1.weight", (0, 3, 7, 7)), ["[0, 3, 7, 7]"]),
    "half a head": (without("fc.weight"), ["2-d", "fc.weight", "bn1.bias", "ResNet18"]),
    "nothing": (dict.clear, ["conv1.weight", "nothing", "torchvision"]),
    "kernel": (with_tensor("conv1.weight", (4, 3, 5, 5)), ["[5, 5]", "3x3 or 7x7"]),
    "bottleneck": (with_tensor("layer1.0.conv3.weight"), ["conv3", "ResNet50"]),
    "integers": (with_tensor("bn1.bias", (4,), np.int8), ["bn1.bias is int8"]),
    "nan": (with_tensor("bn1.bias", value=np.nan), ["bn1.bias is not finite"]),
    "overflow": (
        with_tensor("bn1.bias", (4,), np.float64, 1e300),
        ["bn1.bias is not finite"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_other_tensors_are_named(name, small):
    spoil, expected = MISTAKES[name]
    tensors = torchvision.to_torchvision(small)
    spoil(tensors)
    with pytest.raises(WeightsError) as caught:
        torchvision.from_torchvision(tensors)
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_variables_are_named(small):
    params = {**small["params"], "head": {"bias": np.ones(3, np.float32)}}
    for use in (torchvision.architecture, torchvision.to_torchvision):
        with pytest.raises(WeightsError, match=r"head\.bias is not expected"):
            use({**small, "params": params})
        with pytest.raises(WeightsError, match=r"bn1\.running_mean is missing"):
            use({"params": small["params"]})


# ---------------------------------------------------------------------------
# Growing, heads, grey images.


@pytest.mark.slow
def test_grown_network_computes_the_same():
    """The outputs are equal, because the added blocks add zero to non-negative maps."""
    shallow = Architecture(width=4, num_classes=10)
    variables = random_variables(shallow)
    grown = surgery.grow(jax.random.key(0), variables, ResNet34.blocks)
    deep = torchvision.architecture(grown)
    assert deep == shallow._replace(blocks=ResNet34.blocks)
    x, one_by_one = images(33), run.__wrapped__  # two programs may round differently
    before = one_by_one(shallow.model(), variables, x)
    after = one_by_one(deep.model(), grown, x)
    assert float(jnp.std(before.logits)) > 0.1
    np.testing.assert_array_equal(before.logits, after.logits)
    np.testing.assert_array_equal(before.features, after.features)
    np.testing.assert_array_equal(
        before.maps["stage3_block2"], after.maps["stage3_block6"]
    )


def test_grown_blocks():
    variables = random_variables(Architecture(width=8, num_classes=3))
    grown = surgery.grow(jax.random.key(0), variables, [2, 4, 2, 3])
    assert torchvision.architecture(grown).blocks == (2, 4, 2, 3)
    for part in ("params", "batch_stats"):
        given = {name: grown[part][name] for name in variables[part]}
        assert_same(given, variables[part])
    added = set(grown["params"]) - set(variables["params"])
    assert added == {"layer2_2", "layer2_3", "layer4_2"}
    block = grown["params"]["layer4_2"]
    np.testing.assert_array_equal(block["bn2"]["scale"], np.zeros(64))
    np.testing.assert_array_equal(block["bn1"]["scale"], np.ones(64))
    for conv in ("conv1", "conv2"):
        kernel = block[conv]["kernel"]
        # With 36,864 draws, the standard deviation is known to 0.4 %.
        assert kernel.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
        assert abs(kernel.mean()) < 3 * kernel.std() / 192
    kernels = [grown["params"][n]["conv1"]["kernel"] for n in ("layer2_2", "layer2_3")]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    assert np.abs(block["conv1"]["kernel"] - block["conv2"]["kernel"]).max() > 0.1


def test_grown_blocks_are_of_key_and_place():
    variables = random_variables(SMALL)
    grow = lambda seed, blocks: surgery.grow(jax.random.key(seed), variables, blocks)
    first, deeper = grow(0, (1, 2, 1, 1)), grow(0, (3, 3, 1, 2))
    other = grow(1, (1, 2, 1, 1))
    assert_same(first["params"]["layer2_1"], deeper["params"]["layer2_1"])
    kernel = lambda tree: tree["params"]["layer2_1"]["conv1"]["kernel"]
    assert (kernel(first) != kernel(other)).all()
    assert_same(grow(0, SMALL.blocks), variables)


@pytest.mark.slow
def test_grown_blocks_learn():
    """In an added block only the zero scale has a gradient at first."""
    grown = surgery.grow(jax.random.key(0), random_variables(SMALL), (2, 1, 1, 1))
    model = torchvision.architecture(grown).model()

    @jax.jit
    def gradient(params):
        variables = {**grown, "params": params}
        loss = lambda p: (
            linen_apply(model)({**variables, "params": p}, images(8), train=True)[
                0
            ].logits
            ** 2
        ).mean()
        return jax.grad(loss)(params)["layer1_1"]

    block = gradient(grown["params"])
    assert (np.asarray(block["bn2"]["scale"]) != 0).all()
    assert (np.asarray(block["conv1"]["kernel"]) == 0).all()


@pytest.mark.parametrize("blocks", [(2, 2, 2, 1), (1, 2, 2, 2), (2, 2, 2), (2,) * 5])
def test_no_blocks_are_taken_away(blocks):
    variables = random_variables(Architecture(width=2))
    with pytest.raises(WeightsError, match=r"cannot be grown from \(2, 2, 2, 2\)"):
        surgery.grow(jax.random.key(0), variables, blocks)


def test_replaced_head(small):
    found = surgery.replace_head(jax.random.key(0), small, 1000)
    assert torchvision.architecture(found) == SMALL._replace(num_classes=1000)
    kernel, bias = found["params"]["fc"]["kernel"], found["params"]["fc"]["bias"]
    # Uniform in +- 1 / sqrt(32).
    assert np.abs(kernel).max() == pytest.approx(32**-0.5, rel=1e-3)
    assert kernel.std() == pytest.approx((3 * 32) ** -0.5, rel=0.02)
    np.testing.assert_array_equal(bias, np.zeros(1000))
    back = {**found, "params": {**found["params"], "fc": small["params"]["fc"]}}
    assert_same(back, small)
    other = surgery.replace_head(jax.random.key(1), small, 1000)
    assert (other["params"]["fc"]["kernel"] != kernel).any()
    with pytest.raises(WeightsError, match="num_classes must be .* got 0"):
        surgery.replace_head(jax.random.key(0), small, 0)


def test_summed_channels_see_grey_as_colour(small):
    grey = surgery.sum_channels(small)
    assert torchvision.architecture(grey) == SMALL._replace(channels=1)
    x = images(8, channels=1)
    model = SMALL.model()
    np.testing.assert_allclose(
        run(model, grey, x).logits,
        run(model, small, np.repeat(x, 3, axis=-1)).logits,
        rtol=1e-4,
        atol=1e-5,
    )


def test_surgery_does_not_change_its_input(small):
    before = jax.tree.map(np.copy, small)
    key = jax.random.key(0)
    surgery.grow(key, small, (2, 2, 2, 2))
    surgery.replace_head(key, small, 2)
    surgery.sum_channels(small)
    assert_same(small, before)


def test_float32_under_x64(small, x64):
    grown = surgery.grow(jax.random.key(0), small, (2, 1, 1, 1))
    grown = surgery.replace_head(jax.random.key(0), grown, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {np.dtype(np.float32)}


# ---------------------------------------------------------------------------
# Files.


SUFFIXES = [
    ".safetensors",
    ".npz",
    pytest.param(".pth", marks=needs_torch),
    pytest.param(".pt", marks=needs_torch),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files(small, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    weights.save(path, jax.tree.map(jnp.asarray, small))
    assert_same(weights.load(path), small)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_files_stay(small, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_text("mine")
    with pytest.raises(WeightsError, match="exists.*--force") as caught:
        weights.save(path, small)
    assert str(path) in str(caught.value)
    assert path.read_text() == "mine"
    weights.save(path, small, overwrite=True)
    assert_same(weights.load(path), small)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files_of_half_precision(small, suffix, dtype, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / f"weights{suffix}"
    tensors = torchvision.to_torchvision(small)
    tensors = {k: v.astype(dtype) if v.ndim else v for k, v in tensors.items()}
    save_file(tensors, path) if suffix == ".safetensors" else np.savez(path, **tensors)
    rounded = jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), small)
    assert_same(weights.load(path), rounded)


def damaged(name, content):
    """Makes a file that is truncated, or has other content."""

    def make(folder, small):
        path = folder / name
        if content is None:
            weights.save(path, small)
            path.write_bytes(path.read_bytes()[:-40])
        else:
            path.write_bytes(content)
        return path

    return make


def lone_array(folder, small):
    path = folder / "one.npz"
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    return path


def other_network(folder, small):
    path = folder / "other.npz"
    np.savez(path, **{"conv1.weight": np.ones((4, 3, 3, 3), np.float32)})
    return path


UNREADABLE = {
    "absent": (lambda folder, small: folder / "no.npz", ["cannot read", "no.npz"]),
    "suffix": (lambda folder, small: folder / "r.onnx", ["r.onnx", ".safetensors, "]),
    "empty folder": (lambda folder, small: folder, ["no checkpoint", "run's folder"]),
    "cut": (damaged("a.safetensors", None), ["a.safetensors: damaged", "get it again"]),
    "cut npz": (damaged("a.npz", None), ["a.npz: damaged", "get it again"]),
    "nothing": (damaged("a.safetensors", b""), ["a.safetensors: damaged"]),
    "text": (damaged("a.npz", b"<html>"), ["a.npz: damaged, or no .npz"]),
    "lone array": (lone_array, ["one.npz: damaged, or no .npz"]),
    "another network": (other_network, ["other.npz: tensor bn1.bias is missing"]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files(name, small, tmp_path):
    make, expected = UNREADABLE[name]
    path = make(tmp_path, small)
    with pytest.raises(WeightsError) as caught:
        weights.load(path)
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_or_full_leaves_the_old_file(small, call, tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    path.write_text("mine")

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[call],
                        refuse)  # fmt: skip
    with pytest.raises(WeightsError, match=r"cannot write .*weights.npz: No space"):
        weights.save(path, small, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]
    assert path.read_text() == "mine"


def test_folder_that_does_not_exist(small, tmp_path):
    with pytest.raises(WeightsError, match="No such file .*choose another place"):
        weights.save(tmp_path / "nowhere" / "weights.npz", small)


def test_without_torch(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    path = tmp_path / "weights.pth"
    with pytest.raises(WeightsError, match=r"\.pth files need PyTorch.*pip install"):
        weights.save(path, small)
    path.write_bytes(b"PK")
    with pytest.raises(WeightsError, match=r"weights.pth: \.pth files need PyTorch"):
        weights.load(path)


# ---------------------------------------------------------------------------
# Beside PyTorch.


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def torch_network(torch, name, stem, x):
    """Makes a network with random weights and statistics, like those of a trained one.

    Small kernels make BatchNorm's epsilon matter, because variances are about 1e-3.
    """
    import torch_resnet

    torch.manual_seed(0)
    model = torch_resnet.ResNet(name, stem=stem, width=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.mul_(0.03)
        torch_resnet.calibrate(model, x)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                spread = module.running_var.sqrt()
                module.running_mean += 0.3 * spread * torch.randn_like(spread)
                module.running_var *= torch.empty_like(spread).uniform_(0.5, 2)
    return model.eval()


@pytest.mark.slow
@needs_torch
# Sides are even: with odd sides, "SAME" padding would be the same as torch's.
@pytest.mark.parametrize(("stem", "size"), [("imagenet", 64), ("cifar", 16)])
@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_logits_equal_pytorch(torch, name, stem, size):
    x = images(size, batch=4)
    theirs = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    module = torch_network(torch, name, stem, theirs)
    with torch.no_grad():
        wanted, features = module(theirs)
    assert 0.1 < wanted.std() < 10
    variables = torchvision.from_torchvision(module.state_dict())
    found = torchvision.architecture(variables)
    assert found == Architecture(
        {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}[name], stem, 64, 10
    )
    outputs = run(found.model(), variables, x)
    np.testing.assert_allclose(outputs.logits, wanted.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.features, features.numpy(), rtol=1e-4, atol=1e-4)


@needs_torch
def test_pytorch_loads_ours(torch, tmp_path):
    """PyTorch loads each kind of file with strict names and computes the same."""
    import torch_resnet
    from safetensors.torch import load_file

    given = Architecture(stem="cifar", width=4, num_classes=10)
    variables, x = random_variables(given), images(9)
    wanted = run(given.model(), variables, x).logits
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        weights.save(path, variables)
        read = load_file if suffix == ".safetensors" else torch.load
        module = torch_resnet.ResNet("resnet18", stem="cifar", width=4)
        module.load_state_dict(read(path), strict=True)
        with torch.no_grad():
            logits, _ = module.eval()(torch.from_numpy(x).permute(0, 3, 1, 2))
        np.testing.assert_allclose(logits.numpy(), wanted, rtol=1e-4, atol=1e-4)


@needs_torch
def test_pth_files_as_people_write_them(torch, small, tmp_path):
    tensors = torchvision.to_torchvision(small)
    state = {k: torch.from_numpy(v) for k, v in tensors.items()}
    as_module = {k: torch.nn.Parameter(v.bfloat16()) for k, v in state.items()
                 if v.ndim}  # fmt: skip
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(np.float32), small)
    for content, expected in (
        (state, small),
        ({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, small),
        ({"model": {f"module.{k}": v for k, v in state.items()}}, small),
        (as_module, rounded),
    ):
        torch.save(content, tmp_path / "weights.pth")
        assert_same(weights.load(tmp_path / "weights.pth"), expected)


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("lone", [False, True])
def test_npz_files_run_nothing(lone, tmp_path):
    planted, path = tmp_path / "planted", tmp_path / "weights.npz"
    content = np.array([Planted(planted)], object)
    if lone:  # a pickle with the name of an array file
        path.write_bytes(pickle.dumps(content))
    else:
        np.savez(path, **{"conv1.weight": content})
    with pytest.raises(WeightsError, match=r"weights\.npz: damaged"):
        weights.load(path)
    assert not planted.exists()
    loaded = np.load(path, allow_pickle=True)
    if not lone:
        loaded["conv1.weight"]
    assert planted.exists()  # so the file really was dangerous


def test_npz_files_that_inflate_without_bounds(tmp_path, monkeypatch):
    """A kilobyte contains a megabyte of zeros, twice as much as is allowed."""
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, **{"conv1.weight": np.zeros(250_000, np.float32)})
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(weights, "_MOST_BYTES", 500_000)
    monkeypatch.setattr(np, "load", lambda *_: pytest.fail("inflated"))
    with pytest.raises(WeightsError, match=r"weights\.npz: inflates to 0\.0 GB, and"):
        weights.load(path)


@needs_torch
def test_pth_files_run_nothing(torch, small, tmp_path):
    planted = tmp_path / "planted"
    torch.save({"a": Planted(planted)}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights\.pth: .*more than tensors"):
        weights.load(tmp_path / "weights.pth")
    assert not planted.exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert planted.exists()  # the file was dangerous indeed


@needs_torch
@pytest.mark.parametrize("content", ["cut", "text", "tensor", "number"])
def test_pth_files_of_something_else(torch, small, content, tmp_path):
    path = tmp_path / "weights.pth"
    if content == "cut":
        weights.save(path, small)
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "text":
        path.write_text("<html>")
    else:
        one = torch.ones(3)
        torch.save(one if content == "tensor" else {"conv1.weight": 3}, path)
    with pytest.raises(WeightsError, match=r"weights\.pth: damaged, or more") as caught:
        weights.load(path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------
# The command.


@pytest.fixture(scope="module")
def run_folder(small, tmp_path_factory):
    """Makes a distilled student's run folder: optimizer state, projectors, history."""
    folder = tmp_path_factory.mktemp("runs") / "seed0"
    params = {**small["params"], "projectors": {"dense": {"kernel": np.ones((32, 8))}}}
    state = train_step.create_state(
        {**small, "params": params}, optax.sgd(0.1, 0.9), seed=0, weight=1e-3
    )
    meta = {
        "run": {"dataset": "digits", "student_model": "ResNet9", "width": 4,
                "stem": "cifar", "held_out": 0, "seed": 0},
        "history": [{"epoch": 1}],
    }  # fmt: skip
    checkpoint.save(folder / "checkpoints", 3, state, meta)
    return folder


def call(*arguments):
    return weights.main([str(argument) for argument in arguments])


def test_command_from_file_to_checkpoint_and_back(small, tmp_path, capsys):
    weights.save(tmp_path / "a.npz", small)
    assert call(tmp_path / "a.npz", tmp_path / "folder") == 0
    assert call(tmp_path / "folder", tmp_path / "b.safetensors") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "ResNet9, width 4, cifar stem, 3 channels, 5 classes" in out
    assert_same(weights.load(tmp_path / "b.safetensors"), small)
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "folder"))
    assert meta == {
        "run": {
            "dataset": None,
            "teacher_model": "ResNet9",
            "width": 4,
            "stem": "cifar",
        },
        "num_classes": 5,
        "channels": 3,
        "converted_from": "a.npz",
    }


def test_command_exports_a_student_alone(small, run_folder, tmp_path):
    assert call(run_folder, tmp_path / "student.safetensors") == 0
    assert_same(weights.load(tmp_path / "student.safetensors"), small)
    assert_same(weights.load(run_folder), small)


def test_command_keeps_what_is_known_of_the_training(run_folder, small, tmp_path):
    assert call(run_folder, tmp_path / "student") == 0
    arrays, meta = checkpoint.restore_arrays(checkpoint.find(tmp_path / "student"))
    assert_same(arrays, small)
    run = checkpoint.read_meta(checkpoint.find(run_folder))["run"]
    assert meta == {
        "run": run,
        "num_classes": 5,
        "channels": 3,
        "converted_from": "seed0",
    }


def test_command_takes_checkpoints_of_others(small, tmp_path):
    """A checkpoint of another program, with other metadata."""
    checkpoint.save(tmp_path / "mine", 7, small, {"epoch": 7})
    assert call(tmp_path / "mine", tmp_path / "converted") == 0
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "converted"))
    assert meta["run"]["teacher_model"] == "ResNet9"
    assert meta["run"]["dataset"] is None


def refused(tmp_path, capsys, *arguments):
    """Returns the one-line error of a command that writes nothing."""
    tree = lambda: {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    before = tree()
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert tree() == before
    return err


def test_command_refuses_what_exists(small, tmp_path, capsys):
    source = tmp_path / "a.npz"
    weights.save(source, small)
    (tmp_path / "b.npz").write_text("mine")
    (tmp_path / "folder").mkdir()
    for target in ("a.npz", "b.npz", "folder"):
        error = refused(tmp_path, capsys, source, tmp_path / target)
        assert f"{target} exists; choose another name" in error
        assert "--force" in error
    assert call(source, tmp_path / "b.npz", "--force") == 0
    assert_same(weights.load(tmp_path / "b.npz"), small)
    for _ in range(2):  # into an empty folder, then over a converted checkpoint
        assert call(source, tmp_path / "folder", "--force") == 0
    assert_same(weights.load(tmp_path / "folder"), small)


def test_command_never_mixes_with_a_run(small, run_folder, tmp_path, capsys):
    source = tmp_path / "a.npz"
    weights.save(source, small)
    shutil.copytree(run_folder, tmp_path / "run")
    for target in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        error = refused(tmp_path, capsys, source, target, "--force")
        assert "holds more than a converted checkpoint" in error
    (tmp_path / "file").write_text("mine")
    error = refused(tmp_path, capsys, source, tmp_path / "file", "--force")
    assert "choose another name" in error


def test_errors_of_the_command_name_the_cause(small, run_folder, tmp_path, capsys):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    assert "cannot read" in refused(tmp_path, capsys, a, b)
    weights.save(a, small)
    assert "x.onnx" in refused(tmp_path, capsys, a, tmp_path / "x.onnx")
    assert "no checkpoint" in refused(tmp_path, capsys, tmp_path, b)
    odd = tmp_path / "odd.npz"
    weights.save(odd, surgery.grow(jax.random.key(0), small, (1, 1, 1, 2)))
    error = refused(tmp_path, capsys, odd, tmp_path / "folder")
    assert "ResNet9, ResNet18, ResNet34" in error
    assert "ResNet (1, 1, 1, 2)" in error
    cut = tmp_path / "cut" / "step-00000003"
    shutil.copytree(run_folder / "checkpoints" / "step-00000003", cut)
    (cut / "meta.json").write_text("{}")
    assert "damaged: meta.json" in refused(tmp_path, capsys, cut, b)


def test_command_refuses_another_networks_checkpoint(tmp_path, capsys):
    params = {"dense": {"kernel": np.ones((3, 3), np.float32)}}
    checkpoint.save(tmp_path / "mlp", 1, {"params": params}, {"run": {}})
    error = refused(tmp_path, capsys, tmp_path / "mlp", tmp_path / "b.npz")
    assert "step-00000001: the 4-d tensor conv1.weight is not in dense.weight" in error


COMMAND = "import sys; from kddm_jax.networks.weights import main; sys.exit(main())"


@pytest.mark.slow
def test_command_as_a_user_calls_it(small, tmp_path):
    weights.save(tmp_path / "a.npz", small)
    paths = [str(Path(weights.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "a.npz", "b.safetensors"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("a.npz -> b.safetensors: ResNet9, width 4")
    assert_same(weights.load(tmp_path / "b.safetensors"), small)
    header = (tmp_path / "b.safetensors").read_bytes()[8:]
    assert json.loads(header[: header.index(b"}}") + 2])["__metadata__"] == {
        "format": "pt"
    }
