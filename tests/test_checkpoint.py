"""Tests that checkpoints are whole or absent, and that runs resume bit for bit."""

import ast
import errno
import json
import shutil
from pathlib import Path

import chex
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kddm_jax
from kddm_jax import checkpoint, train_step
from kddm_jax.adapters import nnx_apply
from kddm_jax.checkpoint import CheckpointError


def make_state(seed=0, features=3):
    """Makes a state with arrays, counters and empty nodes."""
    draw = np.random.default_rng(seed).standard_normal
    variables = {
        "params": {
            "conv": {"kernel": jnp.asarray(draw((3, features)), jnp.float32)},
            "identity": {},
        },
        "batch_stats": {"mean": jnp.asarray(draw(features), jnp.float32)},
    }
    tx = optax.chain(
        optax.add_decayed_weights(1e-4),  # has an EmptyState
        optax.sgd(optax.constant_schedule(0.1), momentum=0.9),  # has an int32 count
    )
    state = train_step.create_state(variables, tx, seed=2**32 - 1, weight=1e-3)
    grads = jax.tree.map(jnp.ones_like, state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state.replace(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        step=state.step + 1,
    )


def assert_bit_equal(left, right):
    """Asserts equal structures, dtypes and bytes; NaN equals NaN, 0 differs from -0."""
    chex.assert_trees_all_equal_structs(left, right)
    chex.assert_trees_all_equal_dtypes(left, right)
    as_bytes = lambda tree: [
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)
    ]
    assert as_bytes(left) == as_bytes(right)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Makes a folder with one checkpoint, which other tests copy."""
    folder = tmp_path_factory.mktemp("one")
    checkpoint.save(folder, 1, make_state(), {"epoch": 1})
    return folder


@pytest.fixture
def two(one, tmp_path):
    """Makes a folder with two checkpoints, of steps 1 and 2."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(one, folder)
    shutil.copytree(folder / "step-00000001", folder / "step-00000002")
    return folder


def largest_file(path):
    return max(
        (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


# ---------------------------------------------------------------------------
# Round trip.


def test_round_trip_is_bit_equal(tmp_path):
    state = make_state()
    odd = jnp.asarray([np.nan, -0.0, np.inf, 1e-45], jnp.float32)
    state = state.replace(params={**state.params, "odd": odd})
    meta = {"history": [{"loss": 0.1 + 0.2}], "seconds": 1e-300, "none": None}
    path = checkpoint.save(tmp_path, 7, state, meta)
    # Only the structure may come from `like`.
    like = jax.tree.map(jnp.zeros_like, state)
    restored, found = checkpoint.restore(path, like)
    assert_bit_equal(restored, state)
    assert restored.step.dtype == np.int32
    assert restored.seed.dtype == np.uint32
    assert restored.params["identity"] == {}
    assert found == meta
    assert path.name == "step-00000007"
    assert checkpoint.latest(tmp_path) == path


def test_restored_arrays_stay_on_the_host(one):
    restored, _ = checkpoint.restore(checkpoint.latest(one), make_state())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))


def test_replicated_state_is_saved(tmp_path):
    """The step's state is on every device, and one copy of it is saved."""
    state = make_state()
    path = checkpoint.save(tmp_path, 1, train_step.replicate(state), {})
    assert_bit_equal(checkpoint.restore(path, state)[0], state)


def test_empty_tree_of_statistics(tmp_path):
    state = make_state().replace(batch_stats={})
    path = checkpoint.save(tmp_path, 1, state, {})
    assert_bit_equal(checkpoint.restore(path, state)[0], state)


class NNXNet(nnx.Module):
    """Has a list, statistics, and random keys."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def mlp(seed=0):
    module = eqx.nn.MLP(2, 2, 3, depth=1, key=jax.random.key(seed))
    return eqx.filter(module, eqx.is_array)


# Trees as functions of a seed; arrays differ between seeds.
TREES = {
    "NNX module": NNXNet,
    "state of an NNX module": lambda seed: nnx.state(NNXNet(seed)),
    "variables of nnx_apply": lambda seed: nnx_apply(NNXNet(seed))[1],
    "train state of an NNX module": lambda seed: train_step.create_state(
        nnx_apply(NNXNet(seed))[1], optax.adam(0.1), seed=seed
    ),
    "Equinox module": mlp,
    "Equinox module and optimizer": lambda seed: (
        mlp(seed),
        optax.adam(0.1).init(mlp(seed)),
    ),
    "FrozenDict": lambda seed: flax.core.freeze({"a": {"b": jnp.full(2, seed)}}),
    "keys": lambda seed: {
        "one": jax.random.key(seed),
        "many": jax.random.split(jax.random.key(seed), 3),
        "other": jax.random.key(seed, impl="rbg"),
        "old": jax.random.PRNGKey(seed),
    },
    "noise of an optimizer": lambda seed: optax.add_noise(
        0.1, 0.5, jax.random.key(seed)
    ).init({"a": jnp.full(2, seed)}),
    "empty arrays": lambda seed: {
        "a": jnp.zeros((0, 3), jnp.bfloat16),
        "b": {"c": np.zeros(0, bool), "d": jnp.full(2, seed)},
    },
    "only empty arrays": lambda seed: {"a": jnp.zeros((0, 3))},
    "nothing": lambda seed: {"a": (), "b": None},
    "one array": lambda seed: jnp.full(2, seed),
    "numbers": lambda seed: [seed, 0.5 * seed, seed > 0, np.float32(seed), None],
    "names": lambda seed: {"a/b": seed, "a.b": seed, "": seed, "a b": (seed,)},
    "dtypes": lambda seed: {
        name: jnp.full(2, seed, name)
        for name in ("bfloat16", "float8_e4m3fn", "int4", "complex64", "float16")
    },
}


def plain(tree):
    """Replaces random keys by their data, and all arrays by NumPy arrays."""
    is_key = lambda a: (
        isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
    )
    data = lambda a: jax.random.key_data(a) if is_key(a) else a
    return jax.tree.map(lambda a: np.asarray(data(a)), jax.tree.leaves(tree))


@pytest.mark.parametrize("name", TREES)
def test_trees_of_any_kind(name, tmp_path):
    tree, like = TREES[name](1), TREES[name](0)
    path = checkpoint.save(tmp_path, 1, tree, {})
    restored, _ = checkpoint.restore(path, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    assert_bit_equal(plain(restored), plain(tree))
    for leaf, old in zip(*map(jax.tree.leaves, (restored, tree)), strict=True):
        assert jnp.result_type(leaf) == jnp.result_type(old)  # keys remain keys


# A tree, and a part of the message.
REFUSED = {
    "text": ({"a": {"b": "x"}, "c": 1}, "a/b is no array of numbers, but str"),
    "bytes": ({"a": b"x"}, "a is no array of numbers, but bytes"),
    "function": ([1, jax.nn.relu], "1 is no array of numbers, but custom_jvp"),
    "object": ({"a": np.array([None])}, "a is no array of numbers, but array of obj"),
    "texts": ({"a": np.array(["x"])}, "a is no array of numbers, but array of <U1"),
    "date": ({"a": np.array("2020", "M8[D]")}, "a is no array of numbers"),
}


@pytest.mark.parametrize("name", [*REFUSED, "Equinox", "meta"])
def test_what_is_no_array_is_named(name, tmp_path):
    tree, message = REFUSED.get(name, ({"a": jnp.zeros(1)}, "meta: .*not JSON"))
    if name == "Equinox":
        tree = {"net": eqx.nn.MLP(2, 2, 3, depth=1, key=jax.random.key(0))}
        message = r"net/activation is no array .*eqx.filter\(module, eqx.is_array\)"
    checkpoint.save(tmp_path, 1, {"a": jnp.zeros(1)}, {})
    meta = {"array": np.zeros(2)} if name == "meta" else {}
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.save(tmp_path, 2, tree, meta)
    assert "space" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]


def test_keys_of_another_kind_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"a": jax.random.key(0)}, {})
    for like, shape in ((jax.random.key(0, impl="rbg"), 4), (jnp.zeros(3), 3)):
        with pytest.raises(CheckpointError, match=rf"\[2\], expected \[{shape}\]"):
            checkpoint.restore(path, {"a": like})


def test_restore_arrays_needs_no_structure(one):
    arrays, meta = checkpoint.restore_arrays(checkpoint.latest(one))
    np.testing.assert_array_equal(
        arrays["params"]["conv"]["kernel"], make_state().params["conv"]["kernel"]
    )
    assert meta == {"epoch": 1}


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(tmp_path, keep):
    for step in (1, 2, 9, 10):
        checkpoint.save(tmp_path, step, {"a": np.zeros(1)}, {"step": step}, keep=keep)
    expected = [f"step-{step:08d}" for step in (1, 2, 9, 10)][-keep:]
    assert names(tmp_path) == expected
    assert checkpoint.read_meta(checkpoint.latest(tmp_path)) == {"step": 10}


def test_a_replacement_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    """Also if it fails between the two renames."""
    state = make_state()
    path = checkpoint.save(tmp_path, 1, state, {"epoch": 1})
    rename = Path.rename

    def failing(self, target):
        if self.suffixes == [".partial"]:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.save(tmp_path, 1, make_state(1), {"epoch": 1})
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == path
    assert_bit_equal(checkpoint.restore(path, state)[0], state)


def test_same_step_again_replaces(tmp_path):
    for value in (1.0, 2.0):
        path = checkpoint.save(tmp_path, 1, {"a": np.full(2, value)}, {})
    assert names(tmp_path) == ["step-00000001"]
    np.testing.assert_array_equal(checkpoint.restore_arrays(path)[0]["a"], [2.0, 2.0])


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


# ---------------------------------------------------------------------------
# Damage.


def truncate(path):
    file = largest_file(path / "arrays")
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path):
    file = largest_file(path / "arrays")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def remove_a_file(path):
    largest_file(path / "arrays").unlink()


def add_a_file(path):
    (path / "arrays" / "more").write_bytes(b"")


def alter_meta(path):
    (path / "meta.json").write_text('{"epoch": 3}')


def remove_manifest(path):
    (path / "manifest.json").unlink()


def truncate_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def other_json_manifest(path):
    (path / "manifest.json").write_text("[]")


def empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


DAMAGE = [
    truncate,
    flip_a_bit,
    remove_a_file,
    add_a_file,
    alter_meta,
    remove_manifest,
    truncate_manifest,
    other_json_manifest,
    empty_folder,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_latest_skips_a_damaged_checkpoint(two, damage):
    damage(two / "step-00000002")
    with pytest.warns(UserWarning, match="step-00000002.*delete the folder"):
        found = checkpoint.latest(two)
    assert found == two / "step-00000001"
    assert_bit_equal(checkpoint.restore(found, make_state(1))[0], make_state())


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_not_restored(two, damage):
    path = two / "step-00000002"
    damage(path)
    with pytest.raises(CheckpointError, match="step-00000002") as caught:
        checkpoint.restore(path, make_state())
    assert "\n" not in str(caught.value)


def test_all_damaged_is_an_error(two):
    truncate(two / "step-00000001")
    remove_manifest(two / "step-00000002")
    with (
        pytest.warns(UserWarning, match="step-0000000"),
        pytest.raises(CheckpointError, match="all checkpoints in .* are damaged"),
    ):
        checkpoint.latest(two)


def test_whole_checkpoints_do_not_warn(two):
    checkpoint.verify(two / "step-00000001")
    assert checkpoint.latest(two) == two / "step-00000002"


@pytest.mark.parametrize("path", ["absent", "."])
def test_not_a_checkpoint(tmp_path, path):
    with pytest.raises(CheckpointError, match="no checkpoint.*step-"):
        checkpoint.restore(tmp_path / path, make_state())


def test_find_by_any_of_its_folders(two, tmp_path):
    """A checkpoint, its folder, or the run's folder; the newest of several is found."""
    older, newest = two / "step-00000001", two / "step-00000002"
    assert checkpoint.find(older) == older
    assert checkpoint.find(two) == newest
    shutil.copytree(two, tmp_path / "run" / "checkpoints")
    found = checkpoint.find(tmp_path / "run")
    assert found == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert checkpoint.find(tmp_path / "nowhere") is None


# ---------------------------------------------------------------------------
# Saves that do not come to their end.


class Killed(BaseException):
    """Stands for a signal, which no handler of errors catches."""


def test_killed_before_the_rename(one, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    shutil.copytree(one, folder)

    def kill(self, target):
        raise Killed

    with monkeypatch.context() as patch:
        # Orbax renames within the arrays' folder, so this is the checkpoint's only
        # Path.rename.
        rename = Path.rename
        patch.setattr(
            Path,
            "rename",
            lambda self, target: (
                kill if Path(target).name == "step-00000002" else rename
            )(self, target),
        )
        with pytest.raises(Killed):
            checkpoint.save(folder, 2, make_state(1), {})
    assert names(folder) == ["step-00000001", "step-00000002.partial"]
    assert checkpoint.latest(folder) == folder / "step-00000001"
    # The remains of the killed save do not disturb the next save of that step.
    path = checkpoint.save(folder, 2, make_state(2), {})
    assert names(folder) == ["step-00000001", "step-00000002"]
    assert_bit_equal(checkpoint.restore(path, make_state())[0], make_state(2))


@pytest.mark.parametrize("step", [1, 2])
def test_killed_between_the_renames_of_a_replacement(one, tmp_path, monkeypatch, step):
    """The one that was to be replaced is found, and survives the next save."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(one, folder)
    if step == 2:  # an older one is left
        checkpoint.save(folder, 2, make_state(), {})
    rename = Path.rename

    def killing(self, target):
        if self.name == f"step-{step:08d}.partial":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killing)
        with pytest.raises(Killed):
            checkpoint.save(folder, step, make_state(1), {})
    found = checkpoint.latest(folder)
    assert found.name.startswith(f"step-{step:08d}")
    assert_bit_equal(checkpoint.restore(found, make_state())[0], make_state())
    checkpoint.save(folder, 3, make_state(2), {}, keep=3)
    assert [*names(folder)][-2:] == [f"step-{step:08d}", "step-00000003"]
    kept = checkpoint.restore(folder / f"step-{step:08d}", make_state())[0]
    assert_bit_equal(kept, make_state())


def test_steps_of_nine_digits_are_newer(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        newest = checkpoint.save(tmp_path, step, {"a": np.ones(2)}, {}, keep=2)
        assert checkpoint.latest(tmp_path) == newest
    assert names(tmp_path) == ["step-100000000", "step-100000001"]


def test_killed_saves_of_other_steps_go(one, tmp_path):
    """Otherwise their number would grow with every kill."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(one, folder)
    for left in ("step-00000007.partial", "step-00000001.old.partial"):
        shutil.copytree(one / "step-00000001", folder / left)
    checkpoint.save(folder, 2, make_state(), {})
    assert names(folder) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("step", [2, 3])
def test_killed_while_old_ones_go(two, step, monkeypatch):
    """Partly removed, replaced or old checkpoints do not count as damaged ones."""

    def remove_half(path, **options):
        largest_file(path).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(Killed):
            checkpoint.save(two, step, make_state(1), {}, keep=1)
    assert checkpoint.latest(two) == two / f"step-{step:08d}"
    for path in two.iterdir():
        if path.suffix != ".partial":
            checkpoint.verify(path)
    checkpoint.save(two, step + 1, make_state(1), {}, keep=1)
    assert names(two) == [f"step-{step + 1:08d}"]


def test_damaged_ones_ahead_do_not_count(two):
    """A run that resumed before a damaged checkpoint keeps its own intact ones."""
    shutil.copytree(two / "step-00000002", two / "step-00000009")
    truncate(two / "step-00000009")
    for step in (3, 4):
        checkpoint.save(two, step, make_state(), {}, keep=1)
    assert names(two) == ["step-00000004", "step-00000009"]
    with pytest.warns(UserWarning, match="step-00000009 is damaged"):
        assert checkpoint.latest(two) == two / "step-00000004"


def test_an_interrupted_first_save_leaves_no_checkpoint(one, tmp_path):
    shutil.copytree(one / "step-00000001", tmp_path / "step-00000001.partial")
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("method", ["mkdir", "write_text", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_refused_by_the_disk(one, tmp_path, monkeypatch, method, code):
    folder = tmp_path / "checkpoints"
    shutil.copytree(one, folder)
    refused = OSError(code, errno.errorcode[code])
    original = getattr(Path, method)

    def refuse(self, *arguments, **options):
        if "step-00000002.partial" in self.parts and "arrays" not in str(self):
            raise refused
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with pytest.raises(CheckpointError, match=errno.errorcode[code]) as caught:
            checkpoint.save(folder, 2, make_state(1), {}, keep=1)
    assert "\n" not in str(caught.value)
    assert "step-00000002" in str(caught.value)
    assert "free space or choose another folder" in str(caught.value)
    assert names(folder) == ["step-00000001"]
    assert checkpoint.latest(folder) == folder / "step-00000001"


def test_disk_full_while_arrays_are_written(one, tmp_path):
    """The array writer, not Python, meets a limit on file sizes."""
    resource = pytest.importorskip("resource")
    folder = tmp_path / "checkpoints"
    shutil.copytree(one, folder)
    noise = {"a": np.random.default_rng(0).standard_normal(100_000)}  # 800 kB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(CheckpointError, match="cannot write checkpoint") as caught:
            checkpoint.save(folder, 2, noise, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert "File too large" in str(caught.value)
    assert names(folder) == ["step-00000001"]
    assert checkpoint.latest(folder) == folder / "step-00000001"


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file/checkpoints"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, make_state(), {})
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------
# Another model's checkpoint.


def test_other_shape_names_the_array(one):
    path = checkpoint.latest(one)
    with pytest.raises(CheckpointError, match="another model") as caught:
        checkpoint.restore(path, make_state(features=4))
    message = str(caught.value)
    assert "['conv']['kernel'] has shape [3, 3], expected [3, 4]" in message
    assert str(path) in message
    assert "\n" not in message


def renamed(state, count):
    """Returns a state of a model with other layers."""
    layers = {f"a_layer_with_a_long_name_{i}": jnp.zeros(2) for i in range(count)}
    return state.replace(params=layers)


@pytest.mark.parametrize("count", [1, 9])
def test_other_model_names_an_array(one, count):
    with pytest.raises(CheckpointError, match="another model") as caught:
        checkpoint.restore(checkpoint.latest(one), renamed(make_state(), count))
    message = str(caught.value)
    assert "params" in message  # the place
    assert "a_layer_with_a_long_name" in message or "conv" in message  # the layer
    assert "\n" not in message


@pytest.mark.parametrize("add", [True, False])
def test_one_layer_more_or_less(one, add):
    state = make_state()
    extra = {**state.params, "extra": {"bias": jnp.zeros(2)}}
    like = state.replace(params=extra if add else {"conv": state.params["conv"]})
    if not add:
        like = like.replace(params={})
    with pytest.raises(CheckpointError, match="extra" if add else "conv|params"):
        checkpoint.restore(checkpoint.latest(one), like)


def test_other_optimiser_is_refused(one):
    state = make_state()
    like = train_step.create_state(state.variables, optax.adam(1e-3))
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(checkpoint.latest(one), like)


# ---------------------------------------------------------------------------
# Safety.


def test_nothing_unpickles():
    """No module of the package or the experiments executes the content of a file."""
    package = Path(kddm_jax.__file__).parent
    experiments = Path(__file__).parents[1] / "experiments"
    sources = [*package.rglob("*.py"), *experiments.glob("*.py")]
    assert len(sources) > 10
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                modules = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules = {(node.module or "").split(".")[0]}
            else:
                modules = set()
            assert not modules & forbidden, source
            if isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle", source
            if isinstance(node, ast.Attribute):
                assert node.attr not in forbidden, source


def test_checkpoint_holds_no_pickle(one):
    """All array files are Orbax's, and all records are JSON."""
    path = checkpoint.latest(one)
    for name in ("meta.json", "manifest.json"):
        json.loads((path / name).read_text())
    assert not [p for p in path.rglob("*") if p.suffix in (".pkl", ".pickle", ".npy")]
