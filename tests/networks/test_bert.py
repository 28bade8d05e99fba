"""Tests the BERT encoder against PyTorch's layers, its files, padding and sizes."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kddm_jax import Term, distill_loss
from kddm_jax.networks import bert
from kddm_jax.networks.torchvision import WeightsError

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
SIZES = {"vocabulary": 30, "width": 12, "heads": 3, "hidden": 20, "positions": 9}
TOKENS = jnp.array([[5, 9, 2, 7, 29, 1], [5, 3, 1, 0, 0, 0]])


@pytest.fixture(scope="module")
def encoder():
    """A network of three blocks with every parameter random."""
    model = bert.BERT(num_classes=4, layers=3, **SIZES)
    like = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(0)
    draw = lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32)
    return model, jax.tree.map(draw, like)


def torch_encoder(tensors, heads, epsilon):
    """Makes BERT from PyTorch's own layers, under the names of Hugging Face's."""
    import torch
    from torch import nn

    def embedding(name):
        return nn.Embedding(*tensors[f"embeddings.{name}.weight"].shape)

    def linear(name):
        out, inputs = tensors[f"{name}.weight"].shape
        return nn.Linear(inputs, out)

    def norm(name):
        return nn.LayerNorm(len(tensors[f"{name}.weight"]), eps=epsilon)

    class Tree(nn.Module):
        def __init__(self, **modules):
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

    class Layer(nn.Module):
        def __init__(self, at):
            super().__init__()
            own = {k: linear(f"{at}.attention.self.{k}") for k in ("query", "key")}
            own["value"] = linear(f"{at}.attention.self.value")
            out = Tree(
                dense=linear(f"{at}.attention.output.dense"),
                LayerNorm=norm(f"{at}.attention.output.LayerNorm"),
            )
            self.attention = nn.ModuleDict({"self": Tree(**own), "output": out})
            self.intermediate = Tree(dense=linear(f"{at}.intermediate.dense"))
            self.output = Tree(
                dense=linear(f"{at}.output.dense"),
                LayerNorm=norm(f"{at}.output.LayerNorm"),
            )

        def forward(self, x, mask):
            own, out = self.attention["self"], self.attention["output"]
            split = lambda z: z.unflatten(-1, (heads, -1)).transpose(1, 2)
            seen = nn.functional.scaled_dot_product_attention(
                *(split(f(x)) for f in (own.query, own.key, own.value)),
                attn_mask=mask[:, None, None, :],
            )
            x = out.LayerNorm(x + out.dense(seen.transpose(1, 2).flatten(2)))
            hidden = nn.functional.gelu(self.intermediate.dense(x))
            return self.output.LayerNorm(x + self.output.dense(hidden))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            tables = ("word", "position", "token_type")
            self.embeddings = Tree(
                **{
                    f"{name}_embeddings": embedding(f"{name}_embeddings")
                    for name in tables
                },
                LayerNorm=norm("embeddings.LayerNorm"),
            )
            count = len([n for n in tensors if n.endswith("intermediate.dense.bias")])
            layers = [Layer(f"encoder.layer.{i}") for i in range(count)]
            self.encoder = Tree(layer=nn.ModuleList(layers))
            self.pooler = Tree(dense=linear("pooler.dense"))
            self.classifier = linear("classifier")

        def forward(self, tokens):
            at = self.embeddings
            places = torch.arange(tokens.shape[1])
            x = at.word_embeddings(tokens) + at.position_embeddings(places)
            x = at.LayerNorm(x + at.token_type_embeddings(torch.zeros_like(tokens)))
            states = [x]
            for layer in self.encoder.layer:
                states.append(layer(states[-1], tokens != 0))
            pooled = torch.tanh(self.pooler.dense(states[-1][:, 0]))
            return self.classifier(pooled), pooled, states

    return Encoder()


@needs_torch
def test_it_is_the_network_of_pytorch(encoder, tmp_path):
    """PyTorch writes the file, and both networks agree on every token."""
    import torch
    from safetensors.torch import save_file

    model, variables = encoder
    torch.manual_seed(0)
    tensors = bert.to_tensors(variables)
    tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    theirs = torch_encoder(tensors, model.heads, model.epsilon)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    bert.save(tmp_path / "model.safetensors", model, variables)  # for config.json
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    outputs = jax.jit(model.apply)(bert.load(tmp_path / "model.safetensors")[1], TOKENS)
    with torch.no_grad():
        logits, pooled, states = theirs(torch.tensor(np.array(TOKENS)))
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(outputs.logits, logits, **close)
    np.testing.assert_allclose(outputs.features, pooled, **close)
    kept = np.array(TOKENS) != bert.PADDING
    names = ["embeddings", "block1", "block2", "block3"]
    for name, state in zip(names, states, strict=True):
        ours = outputs.maps[name]
        np.testing.assert_allclose(ours[kept], state.numpy()[kept], **close)


def test_a_file_is_read_as_it_was_written(encoder, tmp_path):
    model, variables = encoder
    path = tmp_path / "model.safetensors"
    bert.save(path, model, variables)
    again, read = bert.load(path)
    assert again == model
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["id2label"]) == len(config["label2id"]) == 4
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "config.json"}
    assert jax.tree.structure(read) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, read, variables)


def test_names_are_those_of_hugging_face(encoder):
    """The names of a BertForSequenceClassification of one block."""
    model, variables = bert.take_layers(*encoder, [2])
    block = "attention.self.query attention.self.key attention.self.value "
    block += "attention.output.dense attention.output.LayerNorm intermediate.dense "
    block += "output.dense output.LayerNorm"
    modules = [f"encoder.layer.0.{name}" for name in block.split()]
    modules += ["embeddings.LayerNorm", "pooler.dense"]
    modules = [*(f"bert.{name}" for name in modules), "classifier"]
    expected = {f"{name}.{leaf}" for name in modules for leaf in ("weight", "bias")}
    for name in ("word", "position", "token_type"):
        expected.add(f"bert.embeddings.{name}_embeddings.weight")
    tensors = bert.to_tensors(variables)
    assert set(tensors) == expected
    assert tensors["bert.encoder.layer.0.intermediate.dense.weight"].shape == (20, 12)
    assert tensors["bert.encoder.layer.0.attention.self.key.weight"].shape == (12, 12)


def test_names_without_a_prefix_and_other_heads(encoder):
    """As in bert-base-uncased's file: other heads, and gamma and beta in LayerNorms."""
    model, variables = encoder
    tensors = {}
    for name, value in bert.to_tensors(variables).items():
        if "classifier" not in name:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old.removeprefix("bert.")] = value
    tensors["cls.predictions.bias"] = np.zeros(30)
    tensors["embeddings.position_ids"] = np.arange(9)
    other, read = bert.from_tensors(tensors, {"num_attention_heads": 3}, num_classes=2)
    assert other == model.clone(num_classes=2)
    assert not np.any(read["params"]["classifier"]["kernel"])
    own = {**variables["params"], "classifier": read["params"]["classifier"]}
    jax.tree.map(np.testing.assert_array_equal, read["params"], own)


def test_padding_changes_nothing(encoder):
    model, variables = encoder
    short = model.apply(variables, TOKENS[1:, :3])
    padded = model.apply(variables, TOKENS)
    np.testing.assert_allclose(padded.logits[1:], short.logits, rtol=1e-5, atol=1e-6)
    for name, layer in short.maps.items():
        np.testing.assert_allclose(
            padded.maps[name][1:, :3], layer, rtol=1e-5, atol=1e-5
        )


def test_masks_leave_out_the_padding(encoder):
    model, variables = encoder
    maps = model.apply(variables, TOKENS).maps
    left = TOKENS != bert.PADDING
    poisoned = jnp.where(left[..., None], maps["block3"], jnp.nan)
    mask = bert.token_masks(TOKENS, ["block3"])

    def loss(student):
        term = Term("l2", layers=("block3", "block3"), positions="each")
        layers = {"block3": student}
        options = {"distance": term, "mask": mask, "weight": 1.0}
        return distill_loss(
            layers,
            {"block3": poisoned + 1},
            jnp.zeros(2, int),
            jnp.zeros((2, 4)),
            **options,
        )[1]["l2@block3"]

    np.testing.assert_allclose(loss(poisoned), 12, rtol=1e-5)  # 12 channels differ by 1


def test_some_layers_make_a_shallower_network(encoder):
    model, variables = encoder
    student, taken = bert.take_layers(model, variables, [1, 3])
    assert student == model.clone(layers=2)
    for name, origin in (("block1", "block1"), ("block2", "block3")):
        assert taken["params"][name] is variables["params"][origin]
    first = model.apply(variables, TOKENS).maps["block1"]
    np.testing.assert_array_equal(student.apply(taken, TOKENS).maps["block1"], first)
    for wrong in ([0], [4], []):
        with pytest.raises(ValueError, match="blocks from 1 to 3"):
            bert.take_layers(model, variables, wrong)


def test_dropout_needs_training_and_a_key(encoder):
    model, variables = encoder
    run = lambda seed, **options: (
        model.apply(
            variables, TOKENS, **options, rngs={"dropout": jax.random.key(seed)}
        ).logits
    )
    np.testing.assert_array_equal(run(0), run(1))
    assert np.all(run(0, train=True) != run(1, train=True))


def test_every_sentence_has_its_own_dropout(encoder):
    """Also in attention, where Flax would drop the same weights for all of them."""
    model, variables = encoder
    model = model.clone(dropout=0.0, attention_dropout=0.5)
    twice = jnp.stack([TOKENS[0], TOKENS[0]])
    keys = {"dropout": jax.random.key(0)}
    one, other = model.apply(variables, twice, train=True, rngs=keys).logits
    assert np.all(one != other)


def test_half_precision_is_close(encoder):
    model, variables = encoder
    whole = model.apply(variables, TOKENS)
    half = model.clone(dtype=jnp.bfloat16).apply(variables, TOKENS)
    assert half.maps["block3"].dtype == jnp.bfloat16
    assert half.logits.dtype == half.features.dtype == jnp.float32
    np.testing.assert_allclose(half.logits, whole.logits, atol=0.1)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.zeros((1, 10), int), "length 10, but the network has 9 positions"),
        (jnp.zeros((1, 2)), r"integers of shape \[b, t\], got float32"),
        (jnp.zeros(3, int), r"got int32 \[3\]"),
    ],
)
def test_wrong_tokens(encoder, tokens, message):
    model, variables = encoder
    with pytest.raises(ValueError, match=message):
        model.apply(variables, tokens)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="num_attention_heads"):
        bert.BERT(width=10, heads=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop("bert.pooler.dense.bias"), "no tensor pooler.dense.bias"),
        (lambda t, c: c.pop("num_attention_heads"), "found no num_attention_heads"),
        (lambda t, c: t.pop("classifier.weight"), "pass num_classes"),
        (lambda t, c: c.update(model_type="distilbert"), "model_type 'distilbert'"),
        (lambda t, c: c.update(hidden_act="relu"), "hidden_act 'relu'"),
        (lambda t, c: c.update(pad_token_id=1), "pad_token_id 1, but .* has 0"),
        (
            lambda t, c: t.update({"bert.pooler.dense.bias": np.zeros(5)}),
            r"pooler.dense.bias has shape \[5\] and not \[12\]",
        ),
        (
            lambda t, c: t.update({"bert.pooler.dense.weight": np.zeros((6, 24))}),
            r"pooler.dense.weight has shape \[6, 24\] and not \[12, 12\]",
        ),
        (
            lambda t, c: t.update({"bert.pooler.dense.bias": np.ones(12, np.int8)}),
            "pooler.dense.bias is int8, .* pass weights that are not quantized",
        ),
        (
            lambda t, c: t.update({"bert.pooler.dense.bias": np.full(12, np.nan)}),
            "pooler.dense.bias is not finite",
        ),
    ],
)
def test_weights_of_another_network(encoder, change, message, tmp_path):
    path = tmp_path / "model.safetensors"
    bert.save(path, *encoder)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = bert.to_tensors(encoder[1])
    change(tensors, config)
    with pytest.raises(WeightsError, match=message):
        bert.from_tensors(tensors, config)


def test_unreadable_files(encoder, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(WeightsError, match="config.json does not exist"):
        bert.load(path)
    bert.save(path, *encoder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        WeightsError, match="model.safetensors: damaged: .*; get it again"
    ):
        bert.load(path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match="config.json is damaged: "):
        bert.load(path)
    path.unlink()
    with pytest.raises(WeightsError, match="model.safetensors does not exist"):
        bert.load(path)
