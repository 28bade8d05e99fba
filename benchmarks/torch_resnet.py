"""Defines ResNet18 and ResNet34 in PyTorch, with the options of `kddm_jax.resnet`.

The names of parameters and statistics are torchvision's.
"""

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Adds two 3x3 convolutions to a shortcut."""

    def __init__(self, channels: int, features: int, stride: int):
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = nn.Identity()
        if stride != 1 or channels != features:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False),
                nn.BatchNorm2d(features),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[b, c, h, w]`` to ``[b, features, h / stride, w / stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Classifies images as `kddm_jax.resnet.ResNet`."""

    def __init__(self, name: str, *, stem: str, width: int, num_classes: int = 10):
        """Makes the layers, initialised as torchvision does."""
        super().__init__()
        imagenet = stem == "imagenet"
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        channels = width
        for stage, count in enumerate(BLOCKS[name], start=1):
            blocks = []
            for block in range(count):
                features = width * 2 ** (stage - 1)
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(BasicBlock(channels, features, stride))
                channels = features
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits ``[b, k]`` and features ``[b, 8 * width]``."""
        x = self.pool(F.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features = x.float().mean((2, 3))
        return self.fc(features), features


@torch.no_grad()
def calibrate(model: nn.Module, images: torch.Tensor) -> None:
    """Sets the statistics of a network to those of one batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
