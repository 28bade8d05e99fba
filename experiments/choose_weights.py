"""Chooses lambda for each distance on held-out training images, never on the test set.

    python experiments/choose_weights.py --grid 1e-4 1e-3 1e-2 -- \
        --dataset digits --held-out 300

See ``--help``. The settings of cifar.py follow ``--``.
"""

import os

# Before the first import of NumPy or JAX: see cifar.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys

from kddm_jax.experiment.choose_weights import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
