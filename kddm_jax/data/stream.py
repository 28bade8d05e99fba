"""Reads batches of a data set that is too large for the device ahead of time.

The images stay in host memory or in a memory-mapped file.  Grain's threads gather the
images of the next dispatches while the device computes.  The caller passes the indices
of the images in each batch.  A streamed run therefore uses the same batches in the same
order as a run whose images are on the device, and can continue at any epoch.
"""

from collections.abc import Iterator

import numpy as np

from kddm_jax.extras import extra


def reads(order: np.ndarray, *, length: int, shares: range, of: int) -> np.ndarray:
    """Assigns the images of an epoch to dispatches and devices.

    Args:
      order: indices of an epoch's batches, shape ``[steps, b]``.
      length: number of steps in one dispatch; must divide ``steps``.
      shares: indices of the shares of each batch that the devices of this process
        read; a batch has ``of`` equal shares.
      of: number of devices of all processes; must divide ``b``.

    Returns:
      Indices, shape ``[steps / length, len(shares), length, b / of]``.

    Raises:
      ValueError: ``length`` does not divide the steps, or ``of`` the batch.

    Examples:
      >>> order = np.arange(8).reshape(2, 4)  # two batches of four
      >>> reads(order, length=1, shares=range(1, 2), of=2).tolist()
      [[[[2, 3]]], [[[6, 7]]]]
    """
    steps, batch = order.shape
    if steps % length or batch % of:
        raise ValueError(
            f"order has shape [{steps}, {batch}]: length={length} must divide the "
            f"steps and of={of} the batch"
        )
    by_device = order.reshape(steps // length, length, of, batch // of)
    return by_device.swapaxes(1, 2)[:, shares.start : shares.stop]


class _Dispatches:
    """Gives Grain random access to the images and labels of each dispatch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray):
        self.images, self.labels, self.rows = images, labels, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        devices = len(self.rows[index])
        at = self.rows[index].reshape(devices, -1)  # [devices, length * b]
        # Sorted, so that a memory-mapped file is read forwards.
        forward = np.argsort(at, axis=None)
        images = np.empty((at.size, *self.images.shape[1:]), self.images.dtype)
        images[forward] = self.images[at.ravel()[forward]]
        return images.reshape(*at.shape, *images.shape[1:]), self.labels[at]


def stream(
    images: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    threads: int = 2,
    ahead: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads the images of one dispatch after another, some dispatches ahead.

    Args:
      images: an array or a memory-mapped file, shape ``[n, h, w, c]``.
      labels: labels of the images, shape ``[n]``.
      rows: indices from `reads`, shape ``[dispatches, devices, length, b]``.
      threads: number of threads that read.
      ahead: number of dispatches that are read ahead.

    Yields:
      Images ``[devices, length * b, h, w, c]`` and labels ``[devices, length * b]``;
      the steps of a device follow one another.
    """
    with extra("kddm_jax.data"):  # imported here: it takes a second
        import grain

    source = grain.MapDataset.source(_Dispatches(images, labels, rows))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    yield from source.to_iter_dataset(options)
