"""Tests the experiment on sentences: its files, its batches, and its command."""

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import text
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import kddm_jax
from kddm_jax.experiment import render
from kddm_jax.experiment.machine.errors import UserError
from kddm_jax.networks import bert

ROOT = Path(kddm_jax.__file__).parents[1]
COUNTS = """
--teacher-sentences 40 --sentences 16 --held-out 20 --length 4 --batch 8 --layers 2 4
--teacher-epochs 12 --steps 4 --teacher-lr 0.01 --lr 0.01 --seeds 0 1
"""
ADJECTIVES = ["bad", "good", "awful", "great"]  # with labels 0, 1, 0, 1
NOUNS = ["film", "plot", "cast", "score", "tale", "role", "scene", "set", "song"]
NOUNS += ["show", "star", "joke"]
WORDS = ["[PAD]", "[UNK]", "the", "a", *ADJECTIVES, *NOUNS]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny encoder with random weights, its tokenizer, and sentences."""
    folder = tmp_path_factory.mktemp("text")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"vocabulary": len(WORDS), "width": 8, "layers": 4, "heads": 2, "hidden": 8}
    model = bert.BERT(**sizes, positions=48, dropout=0.0)
    variables = model.init(jax.random.key(0), np.ones((1, 6), np.int32))
    bert.save(folder / "model.safetensors", model, variables)
    lines = [
        f"{article} {adjective} {noun}\t{i % 2}\n"
        for article, (i, adjective), noun in itertools.product(
            ("the", "a"), enumerate(ADJECTIVES), NOUNS
        )
    ]
    np.random.default_rng(0).shuffle(lines)
    (folder / "test.tsv").write_text("sentence\tlabel\n" + "".join(lines[:32]))
    with gzip.open(folder / "train.tsv.gz", "wt") as file:
        # A second time, and with the test sentences, which must be left out.
        file.write("sentence\tlabel\n" + "".join(lines[32:] * 2 + lines[:32]))
    return folder


@pytest.fixture
def command(files, tmp_path):
    options = ["--weights", files / "model.safetensors", "--train"]
    options += [files / "train.tsv.gz", "--test", files / "test.tsv"]
    options += ["--tokenizer", files / "tokenizer.json", "--out", tmp_path / "out"]
    options += COUNTS.split()
    return [str(option) for option in options]


@pytest.fixture(scope="module")
def folder_of_a_classifier(files, tmp_path_factory):
    """Hugging Face's folder of a fine-tuned teacher."""
    folder = tmp_path_factory.mktemp("classifier")
    bert.save(folder / "model.safetensors", *bert.load(files / "model.safetensors"))
    (folder / "tokenizer.json").write_bytes((files / "tokenizer.json").read_bytes())
    return folder


# --------------------------------------------------------------------- sentences


def test_both_kinds_of_tables_are_read(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('idx\tlabel\tsentence\n0\t1\ta "quote\n1\t0\tb\n')
    assert text.read_rows(path) == [('a "quote', 1), ("b", 0)]
    path.write_text("gj04\t1\t\tThe sailors.\nrhl07\t0\t*\tThe they.\n")
    assert text.read_rows(path) == [("The sailors.", 1), ("The they.", 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a b\n", r"a.tsv, line 1: .* got \['a b'\]; write a header"),
        ("sentence\tlabel\na\t1\nb\tgood\n", r"line 3: .*'good'"),
        ("sentence\tlabel\na\t-1\n", "line 2: .*from 0 up"),
        ("sentence\tlabel\n", "has no sentences"),
    ],
)
def test_other_tables_are_refused(content, message, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        text.read_rows(path)
    with pytest.raises(UserError, match="cannot read"):
        text.read_rows(tmp_path / "b.tsv")


def test_the_parts_have_no_sentence_in_common(files):
    args = argparse.Namespace(
        train=files / "train.tsv.gz",
        test=files / "test.tsv",
        tokenizer=files / "tokenizer.json",
        length=4,
        test_length=4,
        teacher_sentences=40,
        sentences=16,
        held_out=20,
    )
    parts = text.split(args)
    counts = [len(part.labels) for part in parts]
    assert counts == [40, 16, 24, 20, 32]
    assert np.all(parts.unlabelled.labels == -1)
    teacher = np.concatenate([parts.student.tokens, parts.unlabelled.tokens])
    np.testing.assert_array_equal(parts.teacher.tokens, teacher)
    everything = [parts.teacher, parts.held_out, parts.test]
    rows = np.concatenate([part.tokens for part in everything])
    assert len(np.unique(rows, axis=0)) == len(rows) == 92
    args.held_out = 30
    with pytest.raises(UserError, match="has 64 different .* take 70"):
        text.split(args)


def test_scored_sentences_are_longer(files):
    names = {"train": "train.tsv.gz", "test": "test.tsv", "tokenizer": "tokenizer.json"}
    paths = {key: files / name for key, name in names.items()}
    counts = {"teacher_sentences": 40, "sentences": 16, "held_out": 20}
    args = argparse.Namespace(**paths, **counts, length=2, test_length=3)
    parts = text.split(args)
    # Cut to two words, most sentences would be equal.
    assert len(np.unique(parts.teacher.tokens, axis=0)) < 16
    assert len(np.unique(parts.held_out.tokens, axis=0)) == 20
    assert parts.test.tokens.shape == (32, 3)


def test_half_of_a_batch_has_no_labels():
    job = text.Job(steps=1, lr=0.1, batch=8, seed=0)
    order = text.batches(6, 10, job)
    rows = np.array([next(order) for _ in range(15)])
    labelled, others = rows[:, :4], rows[:, 4:]
    assert np.bincount(labelled.ravel()).tolist() == [10] * 6  # ten epochs
    assert np.bincount(others.ravel()).tolist() == [0] * 6 + [6] * 10
    alone = text.batches(6, 0, job)
    assert np.bincount(next(alone), minlength=6).sum() == 8


# --------------------------------------------------------------------- the command


@pytest.mark.slow
def test_students_learn_and_the_command_resumes(command, tmp_path, capsys):
    command += ["--methods", "kd", "linear", "procrustes"]
    assert text.main(command) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # Two students alone, KD, and two distances of two layers; two seeds.
    assert len(results["runs"]) == 2 * (2 + 1 + 2 * 2)
    assert results["teacher"] == 100  # the words decide the label
    assert len(results["rows"]) == 8
    scores = {run["method"]: run["score"] for run in results["runs"]}
    assert scores["procrustes"] > 50
    assert all(run["seconds"] > 0 for run in results["runs"])
    table = render._rendered([tmp_path / "out" / "results.json"])
    assert table in said
    assert "teacher of 4 blocks, 40 labelled sentences" in table

    before = (tmp_path / "out" / "teacher" / "model.safetensors").read_bytes()
    assert text.main(command) == 0
    assert "steps\n" not in capsys.readouterr().out.partition("|")[0]  # no training
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["runs"] == results["runs"]
    assert (tmp_path / "out" / "teacher" / "model.safetensors").read_bytes() == before

    assert text.main([*command, "--states", "first", "--methods", "procrustes"]) == 0
    less = json.loads((tmp_path / "out" / "results.json").read_text())
    assert less["runs"] == results["runs"]
    assert [row[0] for row in less["rows"][3:]] == ["Procrustes + KD, first token"]

    assert text.main([*command, "--sentences", "10"]) == 2
    assert "other settings (sentences)" in capsys.readouterr().err


@pytest.mark.slow
def test_lambdas_are_chosen_on_held_out_sentences(command, tmp_path, capsys):
    more = [
        "--methods",
        "kd",
        "cka",
        "--choose",
        "1",
        "1e9",
        "--choose-lr",
        "0.01",
        "--metric",
        "matthews",
    ]
    assert text.main([*command, *more]) == 0
    results = json.loads((tmp_path / "out" / "choices.json").read_text())
    assert not (tmp_path / "out" / "results.json").exists()
    assert {run["part"] for run in results["runs"]} == {"held_out"}
    assert len(results["rows"]) == 3 + 2 * (1 + 2)
    assert "Matthews correlation of 20 held-out sentences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "--steps 0: choose at least 1"),
        ("--sentences 40", "fewer than --teacher-sentences 40"),
        ("--over cka=1", "'cka' is not a method"),
        ("--over kd=-1", "'-1' is not a number from 0 up"),
        ("--lr fast", "'fast' is not a number from 0 up"),
        ("--held-out 0", "--held-out 0: choose at least 1"),
        ("--batch 1", "--batch 1: choose at least 2"),
        ("--seeds 0 1 0", "--seeds 0 1 0: name each seed once"),
        ("--test-length 3", "--test-length 3 must be at least --length 4"),
    ],
)
def test_wrong_options(command, options, message, capsys):
    with pytest.raises(SystemExit):
        text.parse([*command, *options.split()])
    assert message in capsys.readouterr().err


def _headless(files):
    """Writes an encoder without its classifier."""
    tensors = load_file(files / "model.safetensors")
    kept = {name: a for name, a in tensors.items() if "classifier" not in name}
    save_file(kept, files / "headless.safetensors")


def test_a_tokenizer_of_other_weights(command, files, tmp_path, capsys):
    tokenizer = json.loads((files / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["film"] = 99
    (tmp_path / "other.json").write_text(json.dumps(tokenizer))
    assert text.main([*command, "--tokenizer", str(tmp_path / "other.json")]) == 2
    assert "gives token 99, but the network knows 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--weights no.safetensors", "no.safetensors: No such file or directory"),
        ("--layers 2 5", "--layers 5: the teacher has 4 blocks"),
        (
            "--length 49 --test-length 49",
            "--length 49: the network has 48 positions",
        ),
        ("--test-length 50", "--test-length 50: the network has 48 positions"),
        ("--teacher headless.safetensors", "headless.safetensors: found no classifier"),
    ],
)
def test_wrong_networks_are_one_line(command, files, options, message, capsys):
    _headless(files)
    options = options.replace("headless", str(files / "headless"))
    for _ in range(2):  # a refused command does not keep its settings
        assert text.main([*command, *options.split()]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert text.main([*command, "--layers", "2", "6"]) == 2
    assert "--layers 6: the teacher has 4 blocks" in capsys.readouterr().err


def test_a_missing_tokenizer_is_one_line(command, capsys, tmp_path):
    assert text.main([*command, "--tokenizer", str(tmp_path / "no.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no.json does not exist; pass a tokenizer.json" in line


# --------------------------------------------------------------------- the example


@pytest.mark.slow
def test_the_example(files, folder_of_a_classifier):
    folder = folder_of_a_classifier
    _, *lines = (files / "test.tsv").read_text().splitlines()
    labelled = [*lines[:30], *(line[:-1] + "-1" for line in lines[30:])]
    (folder / "sentences.tsv").write_text("\n".join(labelled * 2))
    example = ROOT / "examples" / "hugging_face.py"
    assert len(example.read_text().splitlines()) < 80
    done = subprocess.run(
        [sys.executable, example, folder, folder / "sentences.tsv"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("step 10 of 10: {")
    assert "'kd': " in last
    assert "'procrustes@block2': " in last
    student, variables = bert.load(folder / "student" / "model.safetensors")
    teacher, own = bert.load(folder / "model.safetensors")
    assert student == teacher.clone(layers=2)
    place = "word_embeddings", "embedding"
    before, after = (tree["params"][place[0]][place[1]] for tree in (own, variables))
    assert 0 < np.max(np.abs(before - after)) < 0.01
    tokenizers = (f / "tokenizer.json" for f in (folder, folder / "student"))
    assert len({file.read_bytes() for file in tokenizers}) == 1
