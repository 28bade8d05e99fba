"""The loss on 2 x 2 devices is that of one, as a command of its own.

    python tests/four_devices.py

The other tests have two devices.  ``test_sharding.py`` has the functions, and reads
what this prints: the ways that were checked, as JSON.
"""

import json
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from test_sharding import on_four_devices

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    json.dump(list(on_four_devices()), sys.stdout)
