"""Defines a BERT encoder that reads and writes the weights of Hugging Face's files.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", arXiv:1810.04805. Every encoder that is a `BertModel` has this form,
such as BERT itself, MiniLM and many sentence encoders; they differ in their sizes.

A block computes `x = norm(x + attention(x))`, then `norm(x + mlp(x))`. Padding is the
token 0, Hugging Face's `[PAD]`; no token attends to it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from kddm_jax.adapters import Outputs, check_positive
from kddm_jax.networks.torchvision import Tensors, WeightsError, as_float32
from kddm_jax.networks.weights import read_safetensors, safetensors_bytes, write
from kddm_jax.numerics.promotion import implicit_promotion

PADDING = 0  # the token [PAD]
_init = nn.initializers.normal(0.02)


def _norm(x: jax.Array, epsilon: float, dtype: Any, name: str) -> jax.Array:
    # Half precision has too few digits for means of squares.
    wide = np.promote_types(dtype, jnp.float32)
    return nn.LayerNorm(epsilon=epsilon, dtype=wide, name=name)(x).astype(dtype)


class _Block(nn.Module):
    """Applies attention between tokens and then a perceptron, with shortcuts."""

    heads: int
    hidden: int
    epsilon: float
    dropout: float
    attention_dropout: float
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Maps tokens `[b, t, c]` with a mask `[b, t]` to tokens of the same shape."""
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        dense = {"dtype": self.dtype, "kernel_init": _init}
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            **dense,
            dropout_rate=self.attention_dropout,
            broadcast_dropout=False,
            deterministic=not train,
            force_fp32_for_softmax=True,
            name="attention",
        )
        y = dropout(attention(x, mask=mask[:, None, None, :]))
        x = _norm(x + y, self.epsilon, self.dtype, "attention_norm")
        y = nn.Dense(self.hidden, **dense, name="mlp_in")(x)
        y = nn.Dense(x.shape[-1], **dense, name="mlp_out")(nn.gelu(y, False))
        return _norm(x + dropout(y), self.epsilon, self.dtype, "mlp_norm")


class BERT(nn.Module):
    """Classifies token sequences by a BERT encoder.

    `model.apply(variables, tokens)` returns `Outputs`. Maps are "embeddings" and the
    tokens after each block, "block1", "block2", ..., shape `[b, t, width]`; those of
    padding have no meaning, see `token_masks`. Features are BERT's pooled output: the
    tanh of a linear map of the first token, which the classifier reads. The defaults
    are the sizes of BERT-base.

    Attributes:
      num_classes: number of logits.
      vocabulary: number of tokens.
      width: number of channels of a token.
      layers: number of blocks.
      heads: number of heads of each attention; must divide `width`.
      hidden: number of channels of the perceptrons' hidden layers.
      positions: length of the longest sequence.
      segments: number of segments; every token is in the first one.
      epsilon: number added to the variances in LayerNorm.
      dropout: probability with which training drops an activation.
      attention_dropout: probability with which training drops a weight of attention.
      dtype: dtype of the computation. Parameters, LayerNorm, features and logits are
        float32 at least; the softmax is float32.

    Examples:
      >>> model = BERT(num_classes=2, layers=3)
      >>> tokens = jnp.zeros((8, 16), jnp.int32)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
      >>> outputs = jax.eval_shape(model.apply, variables, tokens)  # the shapes alone
      >>> outputs.features.shape, outputs.maps["block3"].shape
      ((8, 768), (8, 16, 768))
    """

    num_classes: int = 2
    vocabulary: int = 30_522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    segments: int = 2
    epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        sizes = ("num_classes", "vocabulary", "width", "layers", "heads", "hidden")
        check_positive(self, *sizes, "positions", "segments")
        if self.width % self.heads:
            raise ValueError(
                f"heads must divide the {self.width} channels of a token, got "
                f"{self.heads}; config.json in the folder of the weights has their "
                'number as "num_attention_heads"'
            )

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> Outputs:
        """Classifies sequences of tokens.

        Args:
          tokens: numbers of tokens, int, shape `[b, t]`, padded with 0.
          train: whether to drop activations; needs the random key "dropout".

        Returns:
          Logits, features and maps.

        Raises:
          ValueError: the tokens are not integers of shape `[b, t]`, or are longer than
            `positions`.
        """
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                "tokens must be integers of shape [b, t], got "
                f"{tokens.dtype} {list(tokens.shape)}; pass what the tokenizer returns"
            )
        length = tokens.shape[1]
        if length > self.positions:
            raise ValueError(
                f"tokens have length {length}, but the network has {self.positions} "
                "positions; truncate them"
            )
        mask = tokens != PADDING
        dropout = nn.Dropout(self.dropout, deterministic=not train)

        def table(size, name):
            return nn.Embed(size, self.width, embedding_init=_init, name=name)

        with implicit_promotion():  # Flax's attention and dropout need it
            x = table(self.vocabulary, "word_embeddings")(tokens)
            x += table(self.positions, "position_embeddings")(jnp.arange(length))
            x += table(self.segments, "segment_embeddings")(jnp.zeros((), jnp.int32))
            x = dropout(_norm(x, self.epsilon, self.dtype, "embeddings_norm"))
            maps = {"embeddings": x}
            for i in range(1, self.layers + 1):
                block = _Block(
                    *(self.heads, self.hidden, self.epsilon),
                    *(self.dropout, self.attention_dropout, self.dtype),
                    name=f"block{i}",
                )
                x = block(x, mask, train=train)
                maps[f"block{i}"] = x
            wide = np.promote_types(self.dtype, jnp.float32)
            dense = {"dtype": wide, "kernel_init": _init}
            first = x[:, 0].astype(wide)
            features = jnp.tanh(nn.Dense(self.width, **dense, name="pooler")(first))
            logits = nn.Dense(self.num_classes, **dense, name="classifier")(
                dropout(features)
            )
        return Outputs(logits, features, maps)


def token_masks(tokens: jax.Array, layers: Sequence[str]) -> dict[str, jax.Array]:
    """Makes the masks with which `distill_loss` leaves out padding.

    Args:
      tokens: shape `[b, t]`, padded with 0.
      layers: names of the maps that are compared, of student and teacher.

    Returns:
      `mask` for `distill_loss`: booleans `[b, t]` by layer.

    Examples:
      >>> token_masks(jnp.array([[101, 2307, 102, 0]]), ["block3"])
      {'block3': Array([[ True,  True,  True, False]], dtype=bool)}
    """
    return dict.fromkeys(layers, tokens != PADDING)


# ---------------------------------------------------------------------------
# Hugging Face's files. A linear map is [out, in] there and [in, out] here; attention's
# maps are [in, heads, d] and [heads, d, out] here.

_EMBEDDINGS = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "segment_embeddings": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_BLOCK = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_SUFFIX = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _their_name(path: str) -> str:
    """Translates the path of a parameter, such as block1/mlp_in/kernel."""
    module, leaf = path.rsplit("/", 1)
    if module == "classifier":
        return f"classifier.{_SUFFIX[leaf]}"
    block, _, part = module.partition("/")
    if block in _EMBEDDINGS:
        return f"{_EMBEDDINGS[block]}.{_SUFFIX[leaf]}"
    number = int(block.removeprefix("block")) - 1
    return f"encoder.layer.{number}.{_BLOCK[part]}.{_SUFFIX[leaf]}"


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of their tensor for a parameter."""
    if path.endswith("kernel"):
        inputs = shape[:-1] if "/out/" in path else shape[:1]
        return int(np.prod(shape)) // int(np.prod(inputs)), int(np.prod(inputs))
    return (int(np.prod(shape)),) if path.endswith("bias") else shape


def _flat(variables: Any) -> dict[str, Any]:
    """Returns the parameters by their paths."""
    return dict(traverse_util.flatten_dict(variables["params"], sep="/"))


def to_tensors(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Translates variables to the names of `BertForSequenceClassification`.

    Args:
      variables: `{"params": ...}` of a `BERT`.

    Returns:
      Tensors by name: "classifier.weight", "classifier.bias", and others with "bert.".
    """
    tensors = {}
    for path, value in _flat(variables).items():
        out = _their_shape(path, value.shape)
        value = np.asarray(value)
        value = value.reshape(out[::-1]).T if path.endswith("kernel") else value
        name = _their_name(path)
        prefix = "" if name.startswith("classifier.") else "bert."
        tensors[prefix + name] = np.ascontiguousarray(value.reshape(out))
    return tensors


def from_tensors(
    tensors: Tensors, config: Mapping[str, Any], num_classes: int | None = None
) -> tuple[BERT, dict[str, Any]]:
    """Makes a network and its variables from Hugging Face's tensors.

    Args:
      tensors: tensors by name, with or without the prefix "bert."; tensors of other
        heads are ignored.
      config: what `config.json` holds; "num_attention_heads" is required.
      num_classes: number of logits. None takes the classifier of the tensors.
        Otherwise, a classifier of another size or none at all becomes one of zeros.

    Returns:
      The network and `{"params": ...}`.

    Raises:
      WeightsError: a tensor is missing or has another shape, or the config describes
        another kind of network.
    """
    tensors = {_modern(name): np.asarray(value) for name, value in tensors.items()}
    model = _model_of(tensors, config, num_classes)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 1), jnp.int32))
    flat = {}
    for path, leaf in _flat(like).items():
        name, shape = _their_name(path), _their_shape(path, leaf.shape)
        value = tensors.get(name)
        other = value is None or value.shape != shape
        if name.startswith("classifier.") and num_classes is not None and other:
            value = np.zeros(shape, np.float32)
        if value is None:
            raise WeightsError(
                f"the weights have no tensor {name}; they are not those of a BertModel "
                "with a pooler"
            )
        if value.shape != shape:
            raise WeightsError(
                f"tensor {name} has shape {list(value.shape)} and not {list(shape)}; "
                "config.json and weights must be of one network"
            )
        value = value.T if path.endswith("kernel") else value
        flat[path] = as_float32(name, value).reshape(leaf.shape)
    return model, {"params": traverse_util.unflatten_dict(flat, sep="/")}


def _modern(name):
    """Removes the prefix, and renames the LayerNorms of old files."""
    name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


# What `BERT` computes. Other values describe another network.
_CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "pad_token_id": PADDING,
}


def _model_of(tensors, config, num_classes):
    """Recognizes the sizes of a network from the shapes of its tensors."""
    for name, value in _CONFIG.items():
        if (found := config.get(name, value)) != value:
            raise WeightsError(
                f"config.json has {name} {found!r}, but this network has {value!r}; "
                "take weights of a BertModel"
            )
    try:
        heads = config["num_attention_heads"]
        vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
        positions = len(tensors["embeddings.position_embeddings.weight"])
        segments = len(tensors["embeddings.token_type_embeddings.weight"])
        hidden = len(tensors["encoder.layer.0.intermediate.dense.weight"])
        if num_classes is None:
            num_classes = len(tensors["classifier.weight"])
    except KeyError as error:
        raise WeightsError(
            f"found no {error.args[0]} in weights and config.json; "
            + (
                "pass num_classes"
                if error.args[0] == "classifier.weight"
                else "they are not those of a BertModel"
            )
        ) from None
    names = [name for name in tensors if name.startswith("encoder.layer.")]
    return BERT(
        num_classes=num_classes,
        vocabulary=vocabulary,
        width=width,
        layers=1 + max(int(name.split(".")[2]) for name in names),
        heads=heads,
        hidden=hidden,
        positions=positions,
        segments=segments,
        epsilon=config.get("layer_norm_eps", 1e-12),
        dropout=config.get("hidden_dropout_prob", 0.1),
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
    )


def load(path: Path, num_classes: int | None = None) -> tuple[BERT, dict[str, Any]]:
    """Reads a safetensors file, and `config.json` in its folder.

    Args:
      path: path of the safetensors file.
      num_classes: number of logits.  None takes the classifier of the file.

    Returns:
      The network and `{"params": ...}`.

    Raises:
      WeightsError: a file is missing or unreadable, or of another kind of network.
    """
    path = Path(path)
    described = path.with_name("config.json")
    for file in (described, path):
        if not file.is_file():
            raise WeightsError(
                f"{file} does not exist; Hugging Face's folder of a network has "
                "model.safetensors and config.json"
            )
    try:
        config = dict(json.loads(described.read_text()))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{described} is damaged: {error}; get it again") from error
    try:
        return from_tensors(read_safetensors(path), config, num_classes)
    except ValueError as error:  # of `BERT`, too
        raise WeightsError(f"{path}: {error}") from None


def save(path: Path, model: BERT, variables: Mapping[str, Any]) -> None:
    """Writes a safetensors file, and `config.json` in its folder.

    `load` reads them, and so does `BertForSequenceClassification` of Hugging Face.

    Args:
      path: path of the safetensors file.
      model: the network.
      variables: its `{"params": ...}`.

    Raises:
      WeightsError: a file cannot be written.
    """
    path = Path(path)
    labels = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
    config = {
        **_CONFIG,
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.hidden,
        "max_position_embeddings": model.positions,
        "type_vocab_size": model.segments,
        "layer_norm_eps": model.epsilon,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }
    write(path.with_name("config.json"), json.dumps(config, indent=1).encode() + b"\n")
    write(path, safetensors_bytes(to_tensors(variables)))


def take_layers(
    model: BERT, variables: Mapping[str, Any], layers: Sequence[int]
) -> tuple[BERT, dict[str, Any]]:
    """Makes a shallower network from some blocks of a network.

    Args:
      model: the network.
      variables: its `{"params": ...}`.
      layers: numbers of the blocks to keep, from 1, in their order.

    Returns:
      The shallower network and its variables; all other parameters are the network's.

    Raises:
      ValueError: there is no such block, or none is kept.

    Examples:
      >>> model = BERT(vocabulary=9, width=4, heads=2, hidden=8)
      >>> tokens = jnp.ones((1, 2), jnp.int32)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
      >>> student, taken = take_layers(model, variables, (4, 8, 12))
      >>> student.layers, sorted(name for name in taken["params"] if "block" in name)
      (3, ['block1', 'block2', 'block3'])
    """
    if not layers or not all(1 <= number <= model.layers for number in layers):
        raise ValueError(
            f"layers must be numbers of blocks from 1 to {model.layers}, got "
            f"{list(layers)}"
        )
    params = {
        name: value
        for name, value in variables["params"].items()
        if not name.startswith("block")
    }
    for place, number in enumerate(layers, start=1):
        params[f"block{place}"] = variables["params"][f"block{number}"]
    return model.clone(layers=len(layers)), {"params": params}
