"""Prepares tiny TFDS sets in both file formats, to be read by tests/data/test_tfds.py.

    pip install -e ".[prepare]"
    python tests/prepare_tfds.py DIR
    KDDM_TEST_TFDS=DIR pytest tests/data/test_tfds.py

Preparing sets needs TensorFlow, and reading ArrayRecord does not. Run this script in
one environment and the tests in another.
"""

import io
import sys
from pathlib import Path

import numpy as np

FORMATS = ("array_record", "tfrecord", "parquet")
CLASSES = ("ant", "bee", "cat")
DAMAGED = (("train", 3), ("test", 0))
COUNTS = {"train": 40, "test": 5, "validation": 4}
SHARDS = 2


def image(name, split, index):
    """Makes the image of an example, uint8, so that tests know every pixel."""
    rng = np.random.default_rng([len(name), len(split), index])
    height, width, channels = 8, 8, 3
    if name == "tiny_sizes":
        height, width = 8 + index % 3, 9 + index % 2
    if name == "tiny_grey":
        channels = 1
    return rng.integers(256, size=(height, width, channels), dtype=np.uint8)


def label(split, index):
    """Returns the label of an example."""
    return (index * index + len(split)) % len(CLASSES)


def make_builders():
    """Returns the builders, each with a special feature."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        SPLITS = ("train", "test")
        SHAPE = (8, 8, 3)
        SUPERVISED = ("image", "label")

        def _features(self):
            return {
                "image": tfds.features.Image(shape=self.SHAPE, encoding_format="png"),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(self._features()),
                supervised_keys=self.SUPERVISED,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.SPLITS}

        def _generate_examples(self, split):
            for index in range(COUNTS[split]):
                yield index, self._example(split, index)

        def _example(self, split, index):
            return {
                "image": image(self.name, split, index),
                "label": CLASSES[label(split, index)],
            }

    class TinyFixed(Tiny):
        """Has two labels and other features, as CIFAR-100, and three splits."""

        SPLITS = ("train", "test", "validation")

        def _features(self):
            coarse = tfds.features.ClassLabel(num_classes=2)
            return {**super()._features(), "coarse": coarse, "id": np.int64}

        def _example(self, split, index):
            return {**super()._example(split, index), "coarse": 1, "id": index}

    class TinySizes(Tiny):
        """Has images of several sizes, and a validation split but no test split."""

        SPLITS = ("train", "validation")
        SHAPE = (None, None, 3)
        SUPERVISED = None

    class TinyGrey(Tiny):
        """Has grey images and two configs; the second is the default."""

        SHAPE = (8, 8, 1)
        BUILDER_CONFIGS = [
            tfds.core.BuilderConfig(name=name, version="1.0.0", description=name)
            for name in ("first", "second")
        ]
        DEFAULT_BUILDER_CONFIG_NAME = "second"

        def _example(self, split, index):
            example = super()._example(split, index)
            if self.builder_config.name == "first":
                example["image"] = 255 - example["image"]
            return example

    class TinyTrain(Tiny):
        """Has only a training split."""

        SPLITS = ("train",)

    class TinyText(Tiny):
        """Has no images."""

        SUPERVISED = None

        def _features(self):
            return {
                "text": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }

        def _example(self, split, index):
            return {"text": str(index), "label": label(split, index)}

    class TinyDamaged(Tiny):
        """Has two images that are damaged."""

        def _example(self, split, index):
            example = super()._example(split, index)
            if (split, index) in DAMAGED:
                example["image"] = io.BytesIO(b"no image")
            return example

    class TinyUnlabelled(Tiny):
        """Has a test split without labels, as ImageNet, and a validation split."""

        SPLITS = ("train", "test", "validation")

        def _example(self, split, index):
            example = super()._example(split, index)
            return {**example, "label": -1 if split == "test" else example["label"]}

    class TinyHalf(Tiny):
        """Has training images without labels."""

        def _example(self, split, index):
            example = super()._example(split, index)
            return {**example, "label": -1 if split == "train" else example["label"]}

    class TinyFloats(Tiny):
        """Has images of floats."""

        def _features(self):
            image = tfds.features.Image(shape=(8, 8, 1), dtype=np.float32)
            return {**super()._features(), "image": image}

        def _example(self, split, index):
            example = super()._example(split, index)
            return {**example, "image": example["image"][..., :1].astype(np.float32)}

    class TinyTest(Tiny):
        """Has no training split."""

        SPLITS = ("test", "validation")

    kinds = [TinyFixed, TinySizes, TinyGrey, TinyTrain, TinyText]
    return [*kinds, TinyDamaged, TinyUnlabelled, TinyHalf, TinyFloats, TinyTest]


def main(root):
    """Prepares all sets in ``root/<file format>``."""
    import tensorflow_datasets as tfds

    # Shards of 20 training images each, because TFDS interleaves blocks of 16 images by
    # default.
    shards = tfds.download.DownloadConfig(num_shards=SHARDS)
    for builder in make_builders():
        configs = [config.name for config in builder.BUILDER_CONFIGS] or [None]
        for file_format in FORMATS:
            for config in configs:
                builder(
                    data_dir=Path(root) / file_format,
                    config=config,
                    file_format=file_format,
                ).download_and_prepare(download_config=shards)


if __name__ == "__main__":
    main(sys.argv[1])
