"""Tunes every method on held-out training images, never on the test set.

    python experiments/choose_weights.py --normalizations None unit -- \
        --dataset digits --held-out 300 --seeds 0 1

See ``--help``. The settings of cifar.py follow ``--``.
"""

import os

# Before the first import of NumPy or JAX: see cifar.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys

from kddm_jax.experiment.choose_weights import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
