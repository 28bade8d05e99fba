"""What an installed wheel has to do, from a folder with nothing of ours in it."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import kddm_jax

package = Path(kddm_jax.__file__).parent
assert package.parent.name == "site-packages", f"{package} is no installed wheel"
assert (package / "py.typed").is_file(), f"{package} has no py.typed"

x = jax.random.normal(jax.random.key(0), (16, 4))
value = float(kddm_jax.wasserstein(x, x + 3.0))
assert abs(value - 36) < 0.01, f"a translation by 3 along 4 axes is 36, got {value}"

labels = jnp.arange(16) % 4


def loss_fn(x):
    loss, _ = kddm_jax.distill_loss(
        x,
        jax.lax.stop_gradient(x) + 3.0,
        labels,
        x,
        distance="cw2",
        weight=0.1,
        task_weight=0.0,
    )
    return loss


gradient = jax.grad(loss_fn)(x)
size = float(jnp.abs(gradient).max())
# Each of 16 samples is pulled by 3 along each axis: 0.1 * 2 * 3 / 16.
assert abs(size - 0.0375) < 1e-3, f"the distance's gradient is {size}, not 0.0375"
print(
    f"Python {sys.version.split()[0]}, JAX {jax.__version__}: W2 {value:.2f}, "
    f"gradient up to {size:.2f}, py.typed"
)
