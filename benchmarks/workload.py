"""Settings, data and constants of both frameworks, and the peak of devices."""

import re
from typing import NamedTuple

import numpy as np

CLASSES = 10
LEARNING_RATE = 1e-2
MEAN, STD = 0.5, 0.25  # for every channel

# Dense bfloat16 TFLOP/s by words of the device_kind, from data sheets.
PEAKS = {
    "GB200": 2500,
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5p": 459,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}


def peak_tflops(kind: str) -> float | None:
    """Returns dense bfloat16 TFLOP/s, or None if the table lacks the device."""
    if "MIG" in kind:  # a slice of the device
        return None
    for name in sorted(PEAKS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", kind, re.IGNORECASE):
            return PEAKS[name]
    return None


class Setting(NamedTuple):
    """Describes what the compared programs have in common."""

    stem: str
    width: int
    batch: int
    dtype: str


def default_settings(backend: str) -> list[Setting]:
    """Returns settings for the machine: minutes on a CPU, else full size."""
    if backend == "cpu":
        kinds = [(stem, width) for stem in ("imagenet", "cifar") for width in (16, 64)]
        return [Setting(stem, width, 128, "float32") for stem, width in kinds]
    return [
        Setting("cifar", 64, batch, dtype)
        for batch in (128, 1024)
        for dtype in ("float32", "bfloat16")
    ]


class Data(NamedTuple):
    """Holds random images, uint8 ``[n, 32, 32, 3]``, labels ``[n]`` and batches."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray  # [steps of one dispatch, b]


def make_data(batch: int, steps: int) -> Data:
    """Makes the same data for both frameworks."""
    rng = np.random.default_rng(0)
    n = max(10_000, 2 * batch)
    return Data(
        rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8),
        rng.integers(0, CLASSES, n, dtype=np.int32),
        rng.integers(0, n, (steps, batch), dtype=np.int32),
    )
