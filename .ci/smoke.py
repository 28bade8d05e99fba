"""Runs an installed wheel from a folder with nothing of ours in it.

python smoke.py core          with what `pip install kddm-jax` brings
python smoke.py experiments   with the extra `[experiments]`, in an empty folder
"""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import kddm_jax
from kddm_jax import checkpoint, data
from kddm_jax.adapters import linen_apply
from kddm_jax.data.augment import normalize
from kddm_jax.resnet import ResNet9
from kddm_jax.train_step import create_state, make_train_step

package = Path(kddm_jax.__file__).parent
assert package.parent.name == "site-packages", f"{package} is no installed wheel"
assert (package / "py.typed").is_file(), f"{package} has no py.typed"


def check_losses():
    """A distance by Sinkhorn, the loss, and its gradient."""
    x = jax.random.normal(jax.random.key(0), (16, 4))
    value = float(kddm_jax.wasserstein(x, x + 3.0))
    assert abs(value - 36) < 0.01, f"a translation by 3 along 4 axes is 36, got {value}"

    def loss_fn(x):
        loss, _ = kddm_jax.distill_loss(
            x,
            jax.lax.stop_gradient(x) + 3.0,
            jnp.arange(16) % 4,
            x,
            distance="cw2",
            weight=0.1,
            task_weight=0.0,
        )
        return loss

    size = float(jnp.abs(jax.grad(loss_fn)(x)).max())
    # Each of 16 samples is pulled by 3 along each axis: 0.1 * 2 * 3 / 16.
    assert abs(size - 0.0375) < 1e-3, f"the gradient is {size}, not 0.0375"
    return value, size


def check_step():
    """One train step of a ResNet."""
    model, tx = ResNet9(width=4), optax.sgd(0.1)
    images = jnp.arange(8 * 8 * 8, dtype=jnp.uint8).reshape(8, 8, 8, 1)
    initialise = jax.jit(model.init)
    variables, teacher = (
        initialise(jax.random.key(seed), images.astype(jnp.float32)) for seed in (0, 1)
    )
    step = make_train_step(
        linen_apply(model),
        linen_apply(model),
        tx,
        augment=lambda key, image: normalize(image, (0.5,), (0.25,)),
        distance="w2_gaussian",
        axis_name=None,
    )
    state = create_state(variables, tx, weight=0.1)
    state, metrics = jax.jit(step)(state, teacher, images, jnp.arange(8))
    assert int(state.step) == 1
    assert bool(metrics["finite"]), metrics
    return float(metrics["loss"])


def answer(use, *arguments):
    """The one line that a missing extra gives."""
    try:
        use(*arguments)
    except ImportError as error:
        text = str(error)
    else:
        raise AssertionError(f"{use} needs no extra")
    assert text.endswith('pip install "kddm-jax[experiments]"'), text
    assert "\n" not in text, text
    return text


def check_core():
    """Checks that the core computes, and that the rest names the missing extra."""
    value, size = check_losses()
    print(f"W2 {value:.2f}, gradient up to {size:.4f}, a step: loss {check_step():.2f}")
    print(answer(data.load, "digits"))
    # Flax brings Orbax along; a core without it answers, too.
    sys.modules["orbax.checkpoint"] = None
    print(answer(checkpoint.save, Path("run"), 1, {"x": jnp.zeros(2)}, {}))


def check_experiments():
    """The README's first experiment, of one epoch."""
    line = "distill --dataset digits --teacher-epochs 1 --epochs 1 --distances cw2 kd"
    command = Path(sys.executable).with_name("kddm")
    subprocess.run(
        [command, *line.split(), "--out", "out", "--no-progress"], check=True
    )
    for name in ("table.md", "curves.png", "report.html"):
        assert (Path("out") / name).stat().st_size > 0, name


print(f"Python {sys.version.split()[0]}, JAX {jax.__version__}")
{"core": check_core, "experiments": check_experiments}[sys.argv[1]]()
