"""Distils a teacher into students with KD2M's distances and prints the table.

    python experiments/cifar.py --dataset digits
    python experiments/cifar.py --dataset cifar10 --data-dir DIR --recipe strong

See ``--help`` for all settings and experiments/README.md for measured results.
"""

import os

# Before the first import of NumPy or JAX: OpenBLAS's own threads turn a 1 ms SVD
# into 800 ms when another job keeps a core busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys

from kddm_jax.experiment.distill import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
