"""Defines a small vision transformer with its features and maps as outputs.

Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929. Features are the
average of the tokens instead of a class token, so that all tokens are on the grid of
patches. The defaults are the student of arXiv:2511.14981 for images of 32 pixels, with
patches of 4 pixels, 8 blocks of 6 heads, tokens of 192 and perceptrons of 576 channels.

A block computes `x + attention(norm(x))`, then `x + mlp(norm(x))`. Layers and
initialization are those of torchvision's `VisionTransformer`, without dropout (and the
three matrices of an attention are initialized separately). Images are NHWC and
normalized.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kddm_jax.adapters import Outputs, check_images, check_positive
from kddm_jax.numerics.promotion import implicit_promotion

_xavier = nn.initializers.xavier_uniform()


def _norm(x: jax.Array, dtype: jax.typing.DTypeLike, name: str) -> jax.Array:
    # Half precision has too few digits for means of squares.
    dtype = np.promote_types(dtype, jnp.float32)
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)(x.astype(dtype))


def _dense(features: int, dtype: jax.typing.DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=_xavier,
        bias_init=nn.initializers.normal(1e-6),
        name=name,
    )


class EncoderBlock(nn.Module):
    """Applies attention between tokens and then a perceptron, with shortcuts."""

    heads: int
    hidden: int
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens `[b, n, c]` to tokens of the same shape."""
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=self.dtype,
            kernel_init=_xavier,
            attention_fn=jax.nn.dot_product_attention,  # its softmax is in float32
            name="self_attention",
        )
        x = x + attention(_norm(x, self.dtype, "ln_1"))
        y = _dense(self.hidden, self.dtype, "mlp_0")(_norm(x, self.dtype, "ln_2"))
        y = nn.gelu(y, approximate=False)
        return x + _dense(x.shape[-1], self.dtype, "mlp_3")(y)


class ViT(nn.Module):
    """Classifies images by a vision transformer.

    It has 3.0 million parameters and 192 features at width 64.

    `model.apply(variables, images)` returns `Outputs`. Maps are "block1", "block2",
    ..., the tokens after each block on the grid of patches, `[b, h, w, 3 * width]`;
    features are their average after a last LayerNorm. Positions are learned, so images
    must have the size that the model was initialized with.

    The teacher ViT-B/16 has `width=256, layers=12, heads=12, mlp_ratio=4, patch=16`.

    Attributes:
      num_classes: number of logits.
      width: 64 is the student of arXiv:2511.14981, as 64 is the published width of a
        ResNet: tokens have `3 * width` channels.
      layers: number of blocks.
      heads: number of heads of each attention; must divide `3 * width`.
      mlp_ratio: the perceptrons' hidden layers have `mlp_ratio * 3 * width` channels.
      patch: side of a patch in pixels; must divide the sides of the image.
      dtype: dtype of the computation. Parameters, LayerNorm, features and logits are
        float32 at least; the softmax is float32.

    Examples:
      >>> model = ViT(num_classes=10)
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> outputs = jax.eval_shape(model.apply, variables, images)  # the shapes alone
      >>> outputs.features.shape, outputs.maps["block8"].shape
      ((2, 192), (2, 8, 8, 192))
    """

    num_classes: int = 10
    width: int = 64
    layers: int = 8
    heads: int = 6
    mlp_ratio: int = 3
    patch: int = 4
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        sizes = ("num_classes", "width", "layers", "heads", "mlp_ratio", "patch")
        check_positive(self, *sizes)
        if 3 * self.width % self.heads:
            raise ValueError(
                f"heads must divide the {3 * self.width} channels of a token, got "
                f"{self.heads}; choose another one, or another width"
            )

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        """Returns the numbers of rows and columns of patches of an image."""
        sides = images.shape[1:3]
        if any(side % self.patch or not side for side in sides):
            raise ValueError(
                f"images must divide into patches of {self.patch} pixels, got "
                f"{sides[0]} x {sides[1]}; resize them or pass another patch"
            )
        rows, columns = (side // self.patch for side in sides)
        if self.has_variable("params", "pos_embedding"):
            known = self.get_variable("params", "pos_embedding").shape[:2]
            if known != (rows, columns):
                raise ValueError(
                    f"images must have the {known[0]} x {known[1]} patches that the "
                    f"model was initialised with, got {rows} x {columns}; resize the "
                    "images, or initialise it on such ones"
                )
        return rows, columns

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
          images: normalized images, shape `[b, h, w, c]`, floating point.
          train: ignored, because the network is the same in training.

        Returns:
          Logits, features and maps.

        Raises:
          ValueError: the images are not a batch of floating point images, do not divide
            into patches, or have another size than the model was initialized with.
        """
        check_images(images)
        rows, columns = self._grid(images)
        b, width = images.shape[0], 3 * self.width

        # A convolution of stride `patch` is one matrix product of the patches.
        x = images.reshape(b, rows, self.patch, columns, self.patch, -1)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows, columns, -1)
        x = nn.Dense(width, dtype=self.dtype, name="conv_proj")(x)
        place = nn.initializers.normal(0.02)
        place = self.param("pos_embedding", place, (rows, columns, width))
        x = x + place[None].astype(x.dtype)  # [b, h, w, width]

        maps, x = {}, x.reshape(b, rows * columns, width)
        for i in range(self.layers):
            hidden = self.mlp_ratio * width
            block = EncoderBlock(
                self.heads, hidden, self.dtype, name=f"encoder_layer_{i}"
            )
            with implicit_promotion():  # Flax's attention needs it in half precision
                x = block(x)
            maps[f"block{i + 1}"] = x.reshape(b, rows, columns, width)

        features = jnp.mean(_norm(x, self.dtype, "ln"), axis=1)  # [b, width]
        logits = nn.Dense(
            self.num_classes,
            dtype=features.dtype,
            kernel_init=nn.initializers.zeros,
            name="heads_head",
        )(features)
        return Outputs(logits, features, maps)
