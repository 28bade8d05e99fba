"""Reads the weights of a torchvision file and fits them to a network."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax

from kddm_jax import resnet
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.experiment.training import models
from kddm_jax.networks import surgery, torchvision, weights


@dataclass(frozen=True)
class Pretrained:
    """Contains the variables of a file, and the network that starts from them.

    Attributes:
      path: path of the file.
      sha256: SHA-256 of the file; a run that starts from another file is another run.
      variables: the variables of the file, fitted to the images' channels.
      model: the network.
      changes: descriptions of the changes that fit the variables to the network.
    """

    path: Path
    sha256: str
    variables: torchvision.Variables
    model: resnet.ResNet
    changes: tuple[str, ...]

    def variables_of(self, seed: int) -> torchvision.Variables:
        """Returns the network's variables; those missing in the file are random."""
        blocks, head = jax.random.split(jax.random.key(seed))
        variables = surgery.grow(blocks, self.variables, self.model.blocks)
        if torchvision.architecture(variables).num_classes == self.model.num_classes:
            return variables
        return surgery.replace_head(head, variables, self.model.num_classes)

    def __str__(self) -> str:
        """Describes the weights in one line."""
        changes = "".join(f"; {change}" for change in self.changes)
        return f"{self.path.name} (sha256 {self.sha256[:8]}){changes}"


def _refuse(option, path, found, model, channels):
    """Raises an error if the file cannot be fitted to the network."""
    who = option.removeprefix("--pretrained-")
    if found.stem != model.stem:
        raise UserError(
            f"{option} {path} has the {found.stem} stem, this run the {model.stem} "
            f"stem; pass --stem {found.stem}"
        )
    if found.width != model.width:
        wider = "--teacher-width" if who == "teacher" else "--width"
        raise UserError(
            f"{option} {path} has width {found.width}, the {who} {model.width}; pass "
            f"{wider} {found.width}"
        )
    if any(has > wants for has, wants in zip(found.blocks, model.blocks, strict=True)):
        raise UserError(
            f"{option} {path} is a {found.name}, deeper than {type(model).__name__}; "
            f"pass a --{who}-model as deep, or weights of a shallower network"
        )
    if found.channels != channels and (found.channels, channels) != (3, 1):
        raise UserError(
            f"{option} {path} reads images of {found.channels} channels, these have "
            f"{channels}; pass weights for {channels}"
        )


def load(option: str, path: Path, model: models.Network, channels: int) -> Pretrained:
    """Reads a file for a network; raises if it does not fit.

    Args:
      option: name of the option, for messages.
      path: path of the file.
      model: the network that starts from the file.
      channels: number of channels of the images.

    Returns:
      The weights.

    Raises:
      UserError: the file does not exist or does not fit, or the network is no ResNet.
    """
    if not isinstance(model, resnet.ResNet):
        raise UserError(
            f"{option} {path} is for a ResNet, this run has {models.name_of(model)}; "
            "leave it out, or choose a ResNet"
        )
    if path.is_dir():
        raise UserError(
            f"{option} {path} is a folder; pass a file, made by "
            f"kddm convert {path} FILE.safetensors"
        )
    try:
        variables = weights.load(path)
    except torchvision.WeightsError as error:
        raise UserError(f"{option}: {error}") from error
    found = torchvision.architecture(variables)
    _refuse(option, path, found, model, channels)
    changes = []
    if found.blocks != model.blocks:
        changes.append(
            f"{found.name} grown to {type(model).__name__}, the added blocks start as "
            "the identity"
        )
    if found.channels != channels:
        changes.append("first convolution summed over the colours for grey images")
        variables = surgery.sum_channels(variables)
    if not found.num_classes:
        changes.append(f"no head: one is drawn for {model.num_classes} classes")
    elif found.num_classes != model.num_classes:
        changes.append(
            f"{found.num_classes} classes: head replaced by one for {model.num_classes}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Pretrained(path, digest, variables, model, tuple(changes))
