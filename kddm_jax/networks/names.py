"""Translates tensor names of a ResNet to torchvision's names.

Names of torchvision, timm, Hugging Face's transformers, and kuangliu's networks for
CIFAR are known.  The network may be part of another one, as ``backbone.conv1.weight``;
all other tensors are left out.  A head that is not a single layer, such as the
projection of self-supervised training, is left out, too.
"""

import re
from collections.abc import Iterable, Mapping

COUNTER = "num_batches_tracked"
_BACKBONE = re.compile(r"(conv1|bn1|layer\d+)\.")

# Patterns after the name of the network, and torchvision's names.
_TRANSFORMERS = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (r"(?:resnet\.)?encoder\.stages\.0\.layers\.", "layer1."),
    (r"(?:resnet\.)?encoder\.stages\.1\.layers\.", "layer2."),
    (r"(?:resnet\.)?encoder\.stages\.2\.layers\.", "layer3."),
    (r"(?:resnet\.)?encoder\.stages\.3\.layers\.", "layer4."),
    (r"layer\.0\.convolution\.", "conv1."),
    (r"layer\.0\.normalization\.", "bn1."),
    (r"layer\.1\.convolution\.", "conv2."),
    (r"layer\.1\.normalization\.", "bn2."),
    (r"layer\.2\.convolution\.", "conv3."),  # only bottlenecks, which are an error
    (r"layer\.2\.normalization\.", "bn3."),
    (r"shortcut\.convolution\.", "downsample.0."),
    (r"shortcut\.normalization\.", "downsample.1."),
    (r"classifier\.1\.", "fc."),
)
_KUANGLIU = ((r"shortcut\.", "downsample."), (r"linear\.", "fc."))


def _renamed(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(rf"(^|\.){pattern}", rf"\g<1>{replacement}", name)
    return name


def _dialect(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Chooses the library's patterns by a name that only this library uses."""
    if any("embedder.embedder.convolution." in name for name in names):
        return _TRANSFORMERS
    if any(re.search(r"layer\d\.\d+\.shortcut\.0\.", name) for name in names):
        return _KUANGLIU
    return ()


def _prefixes(names: Iterable[str]) -> list[str]:
    """Lists the prefixes of networks with a first convolution and a first stage."""
    firsts = (name for name in names if re.search(r"(^|\.)conv1\.weight$", name))
    prefixes = {name.removesuffix("conv1.weight") for name in firsts}
    return sorted(p for p in prefixes if f"{p}layer1.0.conv1.weight" in names)


def torchvision_names(names: Iterable[str]) -> Mapping[str, str]:
    """Finds torchvision's names for the tensors of a ResNet.

    Args:
      names: names of all tensors of a file.

    Returns:
      A mapping from each of the network's names in the file to torchvision's name,
      without BatchNorm's counters and without tensors outside the network.

    Raises:
      ValueError: there are several networks in the file.

    Examples:
      >>> names = ["backbone.conv1.weight", "backbone.layer1.0.conv1.weight", "queue"]
      >>> torchvision_names(names)
      {'backbone.conv1.weight': 'conv1.weight',
       'backbone.layer1.0.conv1.weight': 'layer1.0.conv1.weight'}
    """
    given = [name for name in names if not name.endswith(COUNTER)]
    patterns = _dialect(given)
    found = {name: _renamed(name, patterns) for name in given}
    prefixes = _prefixes(set(found.values()))
    if len(prefixes) > 1:
        networks = ", ".join(prefix.rstrip(".") or "(no prefix)" for prefix in prefixes)
        raise ValueError(
            f"several networks: {networks}; save the tensors of one of them"
        )
    prefix = prefixes[0] if prefixes else ""
    found = {
        name: known.removeprefix(prefix)
        for name, known in found.items()
        if known.startswith(prefix)
    }
    whole = {"conv1.weight", "layer1.0.conv1.weight"} <= set(found.values())
    if whole and not {"fc.weight", "fc.bias"} & set(found.values()):
        found = {n: known for n, known in found.items() if _BACKBONE.match(known)}
    return found
