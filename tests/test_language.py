"""Tests the parts of the language experiment, and its command in a tiny setting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest

import kddm_jax
from kddm_jax import distill_loss, procrustes

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


TINY = language.parse(["--fast"])
TEXT = np.frombuffer(b"def f(x):\n    return x + 1\n\n" * 20, np.uint8)


# ---------------------------------------------------------------------- the text


def test_a_name_decides_the_part(tmp_path):
    """Another file does not change the parts of others; folders are not searched."""
    names = [f"module{i}.py" for i in range(40)]
    for name in names:
        (tmp_path / name).write_text(f"{name}\n")
    before = language.load_text(tmp_path)
    assert set(before) == {"training", "validation", "test"}
    lines = {part: bytes(text).decode().split() for part, text in before.items()}
    assert sorted(sum(lines.values(), [])) == sorted(names)
    assert len(lines["training"]) > max(len(lines["validation"]), len(lines["test"]))

    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "module0.py").write_text("below\n")
    (tmp_path / "_sysconfigdata_here.py").write_text("machine\n")
    (tmp_path / "a.py").write_text("x = 'é'\n")
    after = language.load_text(tmp_path)
    assert {
        part: set(bytes(text).decode().split()) for part, text in after.items()
    } == {
        **{part: set(found) for part, found in lines.items()},
        "training": {*lines["training"], "x", "=", "'?'"},
    }


def test_too_few_sources_are_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(SystemExit, match="no text for the validation part.*--text"):
        language.load_text(tmp_path)


def test_the_standard_library_has_every_part():
    text = language.load_text(TINY.text)
    assert len(text["training"]) > 1_000_000
    assert min(len(part) for part in text.values()) > 100_000
    assert max(part.max() for part in text.values()) < language.CHARACTERS


def test_batches_are_windows_of_the_text():
    args = language.parse(["--fast", "--windows", "12", "--batch", "4"])
    even = language.even_batches(TEXT, args)
    batches = language.random_batches(TEXT, args, seed=0)
    drawn = [next(batches) for _ in range(3)]
    again = next(language.random_batches(TEXT, args, seed=0))
    other = next(language.random_batches(TEXT, args, seed=1))
    assert [batch.shape for batch in (*even, *drawn)] == [(4, args.context + 1)] * 6
    for row in np.concatenate([*even, *drawn]):
        assert bytes(row.astype(np.uint8)) in bytes(TEXT)
    assert bytes(TEXT).startswith(bytes(even[0][0].astype(np.uint8)))
    assert bytes(TEXT).endswith(bytes(even[-1][-1].astype(np.uint8)))
    np.testing.assert_array_equal(drawn[0], again)
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[0] != other).any()


# ------------------------------------------------------------------- the network


@pytest.mark.slow
def test_no_character_sees_a_later_one():
    model = language.Transformer(depth=2, width=8)
    first = jnp.arange(24).reshape(2, 12)
    changed = first.at[:, 7].add(50)

    @jax.jit
    def both(key):
        params = model.init(key, first)
        return model.apply(params, first), model.apply(params, changed)

    before, after = both(jax.random.key(0))
    assert before.logits.shape == (2, 12, language.CHARACTERS)
    assert list(before.layers) == ["block_1", "block_2"]
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(x[:, :7], y[:, :7], atol=1e-6)
        # all later characters depend on it
        assert (np.abs(x - y).max(axis=(0, 2)) > 1e-4)[7:].all()


def test_samples_are_characters():
    x = jnp.arange(2 * 3 * 4).reshape(2, 3, 4)
    flat = language.per_character(language.Outputs(x, {"block_1": 2 * x}))
    np.testing.assert_array_equal(flat.logits[4], x[1, 1])
    np.testing.assert_array_equal(flat.layers["block_1"][4], 2 * x[1, 1])


def test_layers_of_half_the_depth():
    assert language.layer_map(2, 4) == [("block_1", "block_2"), ("block_2", "block_4")]
    assert language.layer_map(3, 6)[0] == ("block_1", "block_2")
    assert language.layer_map(1, 2) == [("block_1", "block_2")]


# ------------------------------------------------------------------- the methods


def cloud(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.slow
def test_every_method_teaches():
    """The terms of each method are finite and positive, and change the student."""
    n, k = 40, 6
    layers = {f"block_{i}": cloud(i, n, 5) for i in (1, 2)}
    guide = {f"block_{i}": cloud(10 + i, n, 7) for i in range(1, 5)}
    labels = jnp.arange(n) % k
    pairs = language.layer_map(2, 4)

    @jax.jit
    def teach(student):
        def loss(student, method):
            return distill_loss(
                *(student[0], guide, labels, student[1], cloud(20, n, k)),
                distance=method.terms(pairs, 30),
                weight=0.5,
                key=jax.random.key(1),
            )

        grad = lambda method: jax.grad(loss, has_aux=True)(student, method)
        return {key: grad(method) for key, method in language.METHODS.items()}

    student = layers, cloud(21, n, k)
    for key, (grads, terms) in teach(student).items():
        names = ["kd"] if key == "kd" else ["of_sample@block_1", "of_sample@block_2"]
        assert sorted(terms) == sorted([*names, "task"])
        assert all(0 < float(terms[name]) < np.inf for name in names), key
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads)), key
        moved = [bool((g != 0).any()) for g in grads[0].values()]
        assert moved == [key != "kd"] * 2


def test_lambdas_were_chosen_on_validation_text():
    """Each is the best of its grid, and not at an end, where a better one may be."""
    bits = {key: {} for key in language.METHODS}
    for name in ("language-weights", "language-weights-low"):
        path = EXPERIMENTS / "results" / f"{name}.json"
        for key, row in json.loads(path.read_text())["validation_bits"].items():
            bits[key].update({float(weight): value for weight, value in row.items()})
    for key, method in language.METHODS.items():
        row = bits[key]
        assert method.weight == min(row, key=row.get), key
        assert min(row) < method.weight < max(row), key


def test_lambda_is_shared_among_layers():
    pairs = language.layer_map(2, 4)
    terms = language.METHODS["cka"].terms(pairs, 30)
    assert [term.weight for term in terms] == [0.5, 0.5]
    assert [term.layers for term in terms] == pairs
    assert [term.weight for term in language.METHODS["kd"].terms(pairs, 30)] == [1]


def test_a_sample_of_all_is_the_distance():
    x, y = cloud(0, 20, 3), cloud(1, 20, 4)

    @jax.jit
    def values():
        at = lambda count, seed: language.at_random(procrustes, count).fn(
            x, y, jax.random.key(seed)
        )
        return procrustes(x, y), at(20, 0), at(10, 0), at(10, 1)

    whole, of_all, first, second = map(float, values())
    assert of_all == pytest.approx(whole, rel=1e-4)
    assert first != pytest.approx(second, rel=1e-3)


# -------------------------------------------------------------------- measuring


class Guess:
    """A network that guesses uniformly, or knows the next character."""

    def __init__(self, knows):
        self.knows = knows

    def read(self, text):
        logits = 100.0 * self.knows * jax.nn.one_hot(text[:, 1:], language.CHARACTERS)
        return language.per_character(language.Outputs(logits, {}))


def test_bits():
    batches = language.even_batches(TEXT, TINY)
    assert language.bits_per_character(Guess(0), batches) == pytest.approx(7.0)
    assert language.bits_per_character(Guess(1), batches) == pytest.approx(0.0)


def record(method, bits, seed=0, width=8):
    numbers = {"procrustes": 0.25, "cka": 0.125, "seconds": 9.6, "cpu_seconds": 12.2}
    settings = {"method": method, "seed": seed, "width": width, "weight": 10.0}
    return {**settings, "bits": bits, **numbers}


def test_table():
    runs = [record("teacher", 2.0, width=16)]
    bits = {"alone": (3.0, 3.2), "longer": (2.9, 2.95), "cka": (2.8, 2.86)}
    runs += [
        record(key, b, i) for key, pair in bits.items() for i, b in enumerate(pair)
    ]
    rows = language.table(runs)["rows"]
    rest, longer = ("0.250", "0.125", "10", "12"), language.TITLES["longer"]
    assert rows == [
        ("teacher", "16", "2.000", "", "", *rest),
        ("student alone", "8", "3.100 ± 0.141", "", "", *rest),
        (longer, "8", "2.925 ± 0.035", "", "", *rest),
        # Differences of -0.1 and -0.09; t of one degree of freedom is 12.706.
        ("CKA", "8", "2.830 ± 0.042", "-0.095 [-0.159, -0.031]", "10", *rest),
    ]
    assert all(len(row) == len(language.COLUMNS) for row in rows)
    one = [run for run in runs if run["seed"] == 0]
    assert language.table(one)["rows"][-1][3] == "-0.100"


def test_equal_compute_counts_teacher_and_distance():
    tiny = language.parse(["--fast", "--steps", "100", "--methods", "kd"])
    steps = language.equal_steps(tiny, 8)
    # Per character, a block of width d has 12 d² products and the head 128 d. A
    # training step takes three forward passes. The teacher has 4 blocks of width 16.
    student, teacher = (
        depth * 12 * width**2 + 128 * width for depth, width in ((2, 8), (4, 16))
    )
    assert steps == pytest.approx(100 * (1 + teacher / (3 * student)), rel=0.25)
    several = language.parse(["--fast", "--steps", "100", "--methods", "kd", "cka"])
    assert language.equal_steps(several, 8) >= steps
    alone = language.parse(["--fast", "--steps", "100", "--methods"])
    assert language.equal_steps(alone, 8) == 100


# -------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--depth 3", "--depth 3: the student has half; choose an even number"),
        ("--student-widths 10", "width 10: choose a multiple of the 4 heads"),
        ("--positions 2000", "at most batch x context = 512"),
        ("--student-widths 64 --positions 60", "more than the student's width"),
        ("--windows 1", "--windows 1: choose at least --batch 8"),
        ("--weights cca=1", "'cca' is not a method; write METHOD=LAMBDA of procrustes"),
        ("--weights cka=x", "argument --weights"),
        ("--choose x", "argument --choose"),
        ("--steps 0", "--steps 0: choose at least 1"),
        ("--seeds 0 0", "--seeds 0 0: name each once, from 0 up"),
        ("--seeds -1", "--seeds -1: name each once, from 0 up"),
    ],
)
def test_mistakes_are_one_line(line, error, capsys):
    with pytest.raises(SystemExit) as stop:
        language.parse(line.split())
    assert stop.value.code == 2
    assert error in capsys.readouterr().err


def test_options_override_fast():
    args = language.parse(["--fast", "--steps", "3"])
    assert (args.steps, args.batch) == (3, language.FAST["batch"])


@pytest.mark.slow
def test_a_network_memorizes_a_text():
    args = language.parse(["--fast", "--lr", "1e-2"])
    model = language.Transformer(depth=2, width=16)
    network = language.train(args, TEXT, model, name="it", steps=200, seed=0)
    assert language.bits_per_character(network, language.even_batches(TEXT, args)) < 1


@pytest.mark.slow
def test_seed_decides_a_run():
    """A weight of zero gives the student alone, and another weight does not."""
    teacher = language.make_teacher(TINY, TEXT)

    def student(seed=0, **learning):
        found = language.make_student(
            TINY, TEXT, teacher, width=8, seed=seed, **learning
        )
        return np.concatenate([np.ravel(p) for p in jax.tree.leaves(found.params)])

    alone = student()
    np.testing.assert_array_equal(alone, student())
    assert np.abs(alone - student(seed=1)).max() > 1e-2
    zero, one = (student(key="procrustes", weight=weight) for weight in (0.0, 1.0))
    # Adam also makes steps for gradients that are only rounding errors, so most are
    # compared.
    assert np.quantile(np.abs(zero - alone), 0.99) < 1e-5
    assert np.quantile(np.abs(one - alone), 0.5) > 1e-5
    np.testing.assert_array_equal(one, student(key="procrustes", weight=1.0))
    assert np.abs(one - alone).max() > 1e-4


@pytest.mark.slow
def test_a_diverging_lambda_is_not_chosen():
    parts = dict.fromkeys(("training", "validation", "test"), TEXT)
    args = language.parse(["--fast", "--methods", "kd", "--choose", "inf", "1"])
    found = language.choose(args, parts)
    assert list(found["validation_bits"]["kd"]) == ["1"]
    assert found["weights"] == {"kd": 1.0}
    assert found["rows"][0][:2] == ("KD", "–")


def run(folder, *options):
    """Runs the command in its smallest setting; returns its JSON, page and output."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [
            sys.executable,
            EXPERIMENTS / "language.py",
            "--fast",
            *options,
            "--out",
            folder,
        ],
        env={
            **kept,
            "PYTHONPATH": str(Path(kddm_jax.__file__).parents[1]),
            "PYTHONWARNINGS": "error",
            "PYTHONIOENCODING": "utf-8",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode, done.stderr) == (0, "")
    name = "language-weights" if "--choose" in options else "language"
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.json", f"{name}.md"]
    page = (folder / f"{name}.md").read_text()
    assert done.stdout.endswith(page + "\n")
    return json.loads((folder / f"{name}.json").read_text()), page, done.stdout


@pytest.mark.bench
def test_language(tmp_path, monkeypatch):
    from kddm_jax.experiment.report import table as report

    line = ("--seeds", "0", "1", "--weights", "cka=0.25")
    results, page, printed = run(tmp_path, *line)
    names = [run["method"] for run in results["runs"]]
    assert names == ["teacher", *([*language.ALONE, *language.METHODS] * 2)]
    for record in results["runs"]:
        numbers = [value for value in record.values() if isinstance(value, float)]
        assert np.isfinite(numbers).all()
        assert 0 < record["bits"] < 10
    assert "student cka, lambda 0.25, width 8, seed 1: step 2 of 2" in printed
    words = ("python experiments/language.py --fast", *line)
    assert results["command"] == " ".join(words)
    assert report.markdown(results) == page


@pytest.mark.bench
def test_language_chooses_weights(tmp_path):
    line = ("--choose", "0.5", "2", "--methods", "cka", "kd")
    results, page, _ = run(tmp_path, *line)
    bits = results["validation_bits"]
    assert {key: list(row) for key, row in bits.items()} == {
        "cka": ["0.5", "2"],
        "kd": ["0.5", "2"],
    }
    for key, row in bits.items():
        assert row[f"{results['weights'][key]:g}"] == min(row.values())
    assert page.startswith("|  | λ = 0.5 | λ = 2 |")
