"""Distils a BERT classifier from Hugging Face into every second one of its layers.

    pip install -e ".[text]"
    python examples/hugging_face.py FOLDER SENTENCES

FOLDER has the model.safetensors, config.json and tokenizer.json of a teacher that is
fine-tuned to classify, as `save_pretrained` and `experiments/text.py` write them.
SENTENCES has a sentence, a tab and a label in each line, without a header; the label -1
means that there is none.  The student learns from the labels, from the teacher's
predictions, and from the geometry of its last hidden states.  It is written to
FOLDER/student, where Hugging Face can read it.
"""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from tokenizers import Tokenizer

from kddm_jax import Term
from kddm_jax.adapters import linen_apply
from kddm_jax.networks import bert
from kddm_jax.train_step import create_state, make_train_step

LENGTH, BATCH, EPOCHS = 48, 32, 5

folder, sentences = map(Path, sys.argv[1:])
lines = [line.rsplit("\t", 1) for line in sentences.read_text().splitlines()]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(LENGTH)
tokenizer.enable_padding(length=LENGTH, pad_id=bert.PADDING)
encoded = tokenizer.encode_batch([sentence for sentence, _ in lines])
tokens = np.array([sentence.ids for sentence in encoded], np.int32)
labels = np.array([int(label) for _, label in lines], np.int32)

teacher, teacher_variables = bert.load(folder / "model.safetensors")
kept = range(2, teacher.layers + 1, 2)
student, variables = bert.take_layers(teacher, teacher_variables, kept)

last = f"block{student.layers}", f"block{teacher.layers}"
terms = (
    Term("procrustes", weight=10.0, layers=last, positions="each"),
    Term("kd", options={"temperature": 2.0}),
)
steps = max(EPOCHS * len(labels) // BATCH, 1)
tx = optax.adamw(optax.linear_schedule(1e-4, 0.0, steps))
networks = linen_apply(student), linen_apply(teacher)
step = jax.jit(
    make_train_step(
        *(*networks, tx),
        augment=lambda key, sentence: sentence,  # tokens are not augmented
        distance=terms,
        axis_name=None,
    )
)
state = create_state(variables, tx)
order = np.random.default_rng(0)
for i in range(steps):
    rows = order.permutation(len(labels))[:BATCH]
    padding = bert.token_masks(tokens[rows], last)
    state, metrics = step(
        state, teacher_variables, tokens[rows], labels[rows], {}, padding
    )
    if i % 10 == 0 or i == steps - 1:
        found = {name: round(float(value), 3) for name, value in metrics.items()}
        print(f"step {i + 1} of {steps}: {found}", flush=True)

(folder / "student").mkdir(exist_ok=True)
bert.save(folder / "student" / "model.safetensors", student, state.variables)
shutil.copy(folder / "tokenizer.json", folder / "student")
