"""Runs the benchmarks in their smallest setting, and tests what they write."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from kddm_jax import DISTANCES

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="installed without the benchmarks"
)


@contextlib.contextmanager
def all_cores():
    """Gives what starts inside it the cores of all workers.

    A worker may be pinned to one core, on which PyTorch 2.13's CPU build crashes. A
    `preexec_fn` would fork, about which JAX warns.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    # The parent is the process that starts the workers.
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def run(command, json_file):
    """Returns the output of a benchmark and the JSON that it writes."""
    # Programs run only twice, so compiling them without optimization halves the time.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes"
    script, *options = command.split()
    with all_cores():
        done = subprocess.run(
            [sys.executable, BENCHMARKS / script, *options, "--json", json_file],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(Path(json_file).read_text())


def table(text):
    """Returns head and rows of the first Markdown table, as lists of stripped cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len({len(row) for row in cells[:2]}) == 1
    return cells[0], cells[2:]


@pytest.mark.bench
def test_step(tmp_path):
    text, report = run(
        "step.py --stem imagenet --width 4 --batch-size 8 --steps 2 --no-torch "
        "--distances w2_gaussian nst wkd_logits",
        tmp_path / "step.json",
    )
    head, rows = table(text)
    names = ["none", "w2_gaussian", "nst", "wkd_logits"]
    assert [row[head.index("distance")] for row in rows] == names
    speeds = [row[head.index("images/s")] for row in rows]
    assert all(float(speed.replace(",", "")) > 0 for speed in speeds[:2])
    # Distances that need other inputs say so; the others are measured.
    assert "maps_x must have shape" in speeds[2]
    assert "needs teacher_data={'class_cost'" in speeds[3]
    assert [row["finite"] for row in report["rows"][:2]] == [True, True]
    assert all(row["tflops"] > 0 for row in report["rows"][:2])
    assert all(row["gap_ms"] >= 0 for row in report["rows"][:2])
    assert "gap ms" in head


def test_claims_of_the_step(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # set by step.py
    import step

    def row(
        ms, framework="JAX", distance="none", *, setting=("cifar", 64, 128), **more
    ):
        of_size = dict(zip(("stem", "width", "batch"), setting, strict=True))
        kind = {"dtype": "float32", "framework": framework, "distance": distance}
        return {**of_size, **kind, "ms_per_step": ms, "share_of_peak": None, **more}

    small, tests = ("imagenet", 16, 128), ("imagenet", 16, 8)
    rows = [
        row(100.0),
        row(106.0, distance="w2", distance_ms=6.0),
        row(104.0, distance="jw2/exact", distance_ms=4.0),
        row(103.0, distance="w2_gaussian/svd", distance_ms=3.0),
        row(150.0, distance="gromov", distance_ms=50.0),  # not one of KD2M's
        row(80.0, "PyTorch eager"),
        row(50.0, "PyTorch compile"),
        row(50.0, "PyTorch eager", "w2_gaussian"),
        row(10.0, setting=small),
        row(20.0, distance="w2", distance_ms=10.0, setting=small),
        row(9.0, "PyTorch eager", setting=small),
        row(10.0, setting=tests),
        row(9.0, "PyTorch eager", setting=tests),
        row(10.0, setting=small, dtype="bfloat16"),
        row(9.0, "PyTorch eager", setting=small, dtype="bfloat16"),
        {**row(0.0, setting=("imagenet", 64, 128)), "note": "not run: out of time"},
    ]
    little, large = (
        f"{stem}, width {width}, batch 128, float32: "
        for stem, width in (("imagenet", 16), ("cifar", 64))
    )
    beside = [
        (f"{little}JAX / PyTorch eager", pytest.approx(10 / 9), 1.0),
        (f"{large}JAX / PyTorch eager", 1.25, 1.6),
        (f"{large}JAX / PyTorch compile", 2.0, 1.6),
    ]
    costs = [
        (f"{large}w2 / none", 1.06, 1.05),
        (f"{large}jw2/exact / none", 1.04, 1.05),
        (f"{large}w2_gaussian/svd / none", 1.03, 1.05),
    ]
    found = step.claims(rows, "cpu", same_device=True)
    assert sorted(found, key=str) == sorted(beside + costs, key=str)
    assert step.claims(rows, "cpu", same_device=False) == costs
    assert step.claims(rows, "tpu", same_device=False) == []


def test_claims_of_the_step_on_a_gpu(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import step

    rows = [
        {
            "stem": "cifar",
            "width": 64,
            "batch": batch,
            "dtype": "bfloat16",
            "framework": framework,
            "distance": distance,
            "ms_per_step": ms,
            "distance_ms": ms - 10.0,
            "share_of_peak": share,
        }
        for batch in (128, 1024)
        for framework, distance, ms, share in (
            ("JAX", "none", 10.0, 0.24),
            ("JAX", "w2", 12.0, 0.2),
            ("JAX", "w2_gaussian/svd", 90.0, 0.02),  # not the default, so only reported
            ("PyTorch compile", "none", 8.0, None),
        )
    ]
    names = [f"cifar, width 64, batch {batch}, bfloat16: " for batch in (128, 1024)]
    assert step.claims(rows, "gpu", same_device=True) == [
        (f"{names[0]}JAX / PyTorch compile", 1.25, 1.0),
        (f"{names[1]}w2 / none", 1.2, 1.1),  # at batch 128 it is only reported
        (f"{names[1]}JAX / PyTorch compile", 1.25, 1.0),
        (f"{names[1]}30% of the peak / ours", 1.25, 1.0),
    ]


HELLO = 'import sys, json\nprint(json.dumps({"version": "1"}), flush=True)\n'
ANSWERS = """
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("run") == 7:
        sys.exit(3)
    told = {"losses": [asked["run"]]} if "run" in asked else {"error": "no memory"}
    print(json.dumps(told), flush=True)
"""


def torch_process(monkeypatch, tmp_path, text):
    """Starts a process that runs this text instead of PyTorch's step."""
    import torch_process

    script = tmp_path / "torch_step.py"
    script.write_text(text)
    monkeypatch.setattr(torch_process, "SCRIPT", script)
    return torch_process.TorchProcess()


def test_the_process_of_pytorch_answers_fails_and_ends(monkeypatch, tmp_path):
    process = torch_process(monkeypatch, tmp_path, HELLO + ANSWERS)
    assert process.hello == {"version": "1"}
    assert process.ask(run=2) == {"losses": [2]}
    with pytest.raises(RuntimeError, match="PyTorch: no memory"):
        process.ask(make=[])
    assert process.ask(run=3) == {"losses": [3]}  # the process continues
    for _ in range(2):
        with pytest.raises(RuntimeError, match="PyTorch: ended"):
            process.ask(run=7)
    process.close()
    assert process.process.returncode == 3


def test_the_process_of_pytorch_that_does_not_start(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match=r"torch_step\.py ended with status 4"):
        torch_process(monkeypatch, tmp_path, "import sys\nsys.exit(4)\n")


@pytest.mark.bench
def test_a_missing_python_for_pytorch_is_an_error(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "step.py", "--torch-python", tmp_path / "none"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("PyTorch does not start: ")


@pytest.mark.bench
def test_step_beside_pytorch(tmp_path):
    pytest.importorskip("torch")
    _, report = run(
        "step.py --stem imagenet --width 4 --batch-size 8 --steps 2 "
        "--distances w2_gaussian",
        tmp_path / "step.json",
    )
    rows = [(row["framework"], row["distance"]) for row in report["rows"]]
    both = [
        (framework, d)
        for framework in ("JAX", "PyTorch eager")
        for d in ("none", "w2_gaussian")
    ]
    assert rows == both
    assert all(row["finite"] and row["ms_per_step"] > 0 for row in report["rows"])
    assert report["claims"] == []  # none for this size


@pytest.mark.bench
def test_step_says_what_it_did_not_run(tmp_path):
    # Without time for any row, the table still names the rows.
    text, report = run("step.py --minutes 0 --no-torch", tmp_path / "step.json")
    head, rows = table(text)
    assert {row[head.index("images/s")] for row in rows} == {"not run: out of time"}
    assert len(rows) == len(report["rows"])


@pytest.mark.parametrize(
    ("options", "fast", "slow"),
    [
        ({}, 5, 5),
        ({"least": 12}, 12, 5),  # a fast one continues
        ({"most": 10}, 5, 4),  # a slow one ends after three turns
        ({"most": 2}, 3, 3),
        ({"deadline": 0}, 3, 3),
        ({"least": 12, "most": 10}, 11, 4),
    ],
)
def test_rounds_last_as_long_as_they_should(monkeypatch, options, fast, slow):
    import harness

    clock = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    calls = {
        name: lambda seconds=seconds: clock.__setitem__(0, clock[0] + seconds)
        for name, seconds in {"fast": 1.0, "slow": 3.0}.items()
    }
    taken = harness.interleaved(calls, 5, **options)
    assert taken == {"fast": [1.0] * fast, "slow": [3.0] * slow}


def test_names_of_distances():
    import harness

    row, options = harness.parse_distance("w2/exact")
    assert (row.title, options) == ("W2 (E)", {"solver": "exact"})
    with pytest.raises(SystemExit, match="unknown distance 'w3'; known: w2"):
        harness.parse_distance("w3")


def test_gaps_are_the_time_without_work():
    import gaps

    assert gaps.idle_ns([]) == gaps.idle_ns([(3, 9)]) == 0
    # Intervals within another, overlapping and touching it; then two gaps.
    work = [(0, 10), (2, 5), (8, 12), (12, 13), (20, 21), (24, 30)]
    assert gaps.idle_ns(work) == 7 + 3


@pytest.mark.bench
def test_a_host_that_sleeps_leaves_a_gap():
    import gaps

    product = jax.jit(lambda x: x @ x)
    x = product(jnp.ones((256, 256)))

    def late():
        time.sleep(0.1)
        return product(x)

    # It sleeps in nine of ten dispatches. A busy machine may leave some gaps without
    # sleep.
    assert gaps.idle_ms(lambda: product(x), 10) < 90 < gaps.idle_ms(late, 10)


@pytest.fixture
def ahead(monkeypatch):
    """Imports the module with a copy of the environment for this test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    import ahead

    return ahead


@pytest.mark.bench
def test_the_step_compiled_ahead(ahead):
    """Compiles for this machine: with an SVD on a CPU, with products elsewhere."""
    args = argparse.Namespace(width=2, dtype="bfloat16", steps=2, batch_size=8)
    row = ahead.measure("cw2_gaussian", jax.devices()[:2], args)
    assert row["convolutions"] == row["of_dtype"] == 95  # none for the images
    assert row["decomposed"] == ["svd"]
    assert row["all_gathers"] > 0
    assert row["all_reduces"] > 0
    images = ahead.IMAGES * 32 * 32 * 3 / 1e9
    assert images + row["state_mb"] / 1e3 < row["memory_gb"] < images + 0.1
    broken = [c[0] for c in ahead.claims([row], 1e9, tall=False) if c[1] > c[2]]
    assert broken == ["cw2_gaussian: decompositions"]
    few = ahead.measure("linear_projection", jax.devices()[:2], args)
    assert "n > d + 1" in few["note"]
    assert ahead.claims([few], 1e9, tall=False) == []


def test_every_distance_has_its_teacher_data(ahead):
    """Without it, a distance would be left out with a note."""
    of_step = {"features", "maps", "logits", "labels", "key"}
    needed = {name for row in DISTANCES.values() for name in row.inputs} - of_step
    assert needed == set(ahead.teacher_data(width=2))


def test_claims_about_compiled_programs(ahead):
    row = {
        "distance": "w2",
        "memory_gb": 17.0,
        "state_mb": 90.0,
        "donated_mb": 0.0,
        "convolutions": 95,
        "of_dtype": 93,
        "host": 1,
        "decomposed": ["qr", "svd"],
    }
    fine = {**row, "memory_gb": 1.0, "donated_mb": 91.0, "of_dtype": 95, "host": 0}
    other = {**fine, "distance": "procrustes"}  # not one of KD2M's
    tall = {**fine, "decomposed": ["qr"]}
    failed = {"distance": "kd", "note": "fails: it does not compile", "failed": True}
    absent = {"distance": "linear_projection", "note": "x must have n > d + 1"}
    broken = lambda rows, **options: [
        claim for claim in ahead.claims(rows, 16e9, **options) if claim[1] > claim[2]
    ]
    assert broken([other, tall], tall=True) == []
    assert broken([tall], tall=False) == [("w2: decompositions", 1, 0)]
    assert broken([row, failed, absent], tall=True) == [
        ("w2: memory, GB", 17.0, 16.0),
        ("w2: state that is not donated, MB", 90.0, 0),
        ("w2: convolutions in another dtype", 2, 0),
        ("w2: callbacks, feeds, transfers to the host", 1, 0),
        ("w2: decompositions", 1, 0),
        ("kd: errors of the compiler", 1, 0),
    ]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('%x = (f32[2]) custom-call(%y), custom_call_target="xla_python_callback"', 1),
        ("%x = f32[2] recv-done(%y), is_host_transfer=true", 1),
        ("%x = ((f32[2]), token[]) infeed(%y)", 1),
        ("%x = f32[2] all-reduce(%y)", 0),
    ],
)
def test_transfers_to_the_host_are_seen(text, count, ahead):
    assert len(ahead.HOST.findall(text)) == count


def test_open_loops_are_those_of_unknown_length(ahead):
    known = '  %a = (s32[]) while(%x), body=%b, backend_config={"known_trip_count":{}}'
    text = f"{known}\n  %b = (s32[]) while(%y), body=%c\n{known}\n  %c = add(%b)"
    assert len(ahead.OPEN_LOOP.findall(text)) == 1


def test_operations_and_bytes_of_a_product_are_counted():
    import roofline

    n, d = 64, 32
    x = jax.ShapeDtypeStruct((n, d), jnp.float32)
    counts = roofline.count(lambda x, y: x @ y.T, x, x)
    assert counts == (2 * n * n * d, 4 * (2 * n * d + n * n), 1)


def test_the_body_of_a_loop_is_counted_as_often_as_it_runs():
    import roofline

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    product = lambda x: x @ x / 2
    seven = lambda x: jax.lax.fori_loop(0, 7, lambda _, x: product(x), x)
    unknown = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 5, jax.jit(seven), x)
    once = roofline.count(product, x)
    around = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, unknown, x)
    for fn, times in ((seven, 7), (unknown, 21), (around, 21)):
        counts = roofline.count(fn, x, passes=3)
        assert counts.operations == pytest.approx(times * once.operations, rel=1e-3)
        assert counts.bytes >= times * once.bytes  # and copies
        assert counts.kernels >= times * once.kernels


def test_decompositions_are_counted_and_named():
    import roofline

    x = jax.ShapeDtypeStruct((3, 20, 8), jnp.float32)
    plain = roofline.count(lambda x: x + 1, x).operations
    factor = lambda x: jnp.linalg.qr(x)[0]
    assert roofline.decompositions(factor, x) == ["qr"]
    assert roofline.decompositions(lambda x: x + 1, x) == []
    textbook = 3 * (4 * 20 * 8**2 - 4 / 3 * 8**3)
    # XLA gives -1 for a call that it cannot count.
    counted = roofline.count(factor, x).operations
    assert counted == pytest.approx(textbook, rel=1e-3)
    assert plain == 3 * 20 * 8


def test_kernels_are_those_outside_fusions():
    import roofline

    text = """HloModule jit_fn
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %add.1 = f32[2]{0} add(%p, %p)
}
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.2 = f32[] add(%a, %b)
}
%body (s: (f32[2], s32[])) -> (f32[2], s32[]) {
  %g = f32[2]{0} get-tuple-element(%s), index=0
  %f = f32[2]{0} fusion(%g), kind=kLoop, calls=%fused
  ROOT %t = (f32[2]{0}, s32[]) tuple(%f, %f)
}
ENTRY %main (x: f32[2]) -> f32[] {
  %x = f32[2]{0} parameter(0)
  %w = (f32[2]{0}, /*index=1*/s32[]) while(%x), condition=%cond, body=%body
  %c = f32[2]{0} call(%x), to_apply=%body
  ROOT %r = f32[] reduce(%x), dimensions={0}, to_apply=%sum
}
"""
    assert roofline.kernels(text) == 2  # the fusion and the reduction


def test_shares_are_those_of_a_roofline():
    import roofline

    device = roofline.Device(bfloat16=100.0, float32=10.0, bandwidth=5.0)
    step = roofline.Counts(operations=1000.0, bytes=1e9, kernels=4)  # 10 s
    by_operations = roofline.Counts(operations=20.0, bytes=5.0, kernels=3)  # 2 s
    by_bytes = roofline.Counts(operations=20.0, bytes=20.0, kernels=3)  # 4 s
    assert roofline.share(by_operations, step, device) == pytest.approx(0.2)
    assert roofline.share(by_bytes, step, device) == pytest.approx(0.4)
    launched = (4 + 3 * roofline.LAUNCH) / 10
    assert roofline.share_with_launches(by_bytes, step, device) == launched
    tiny = step._replace(operations=0.0)  # as long as its launches
    assert roofline.share_with_launches(by_bytes, tiny, device) == pytest.approx(
        (4 + 3 * roofline.LAUNCH) / (4 * roofline.LAUNCH)
    )


def shares(distance, batch, h200, tpu, **more):
    """Makes a row of predicted shares."""
    found = {"H200": h200, "TPU v5e": tpu}
    row = {"distance": distance, "batch": batch, "decomposed": []}
    return {**row, "shares": found, "launched": h200, **more}


def test_shares_above_five_percent_are_marked(ahead):
    rows = [
        shares("l2", 128, 0.001, 0.05),
        shares("l2", 4096, 0.0123, 0.05),  # at the goal, not above it
        shares("w2", 128, 0.049, 0.2, decomposed=["qr"]),
        shares("w2", 4096, 0.0512, 1.234, decomposed=["qr"]),
        {"distance": "linear_projection", "batch": 128, "note": "n ≤ d + 1"},
        shares("linear_projection", 4096, 0.01, 0.01, decomposed=["svd"]),
    ]
    assert [ahead.over(row) for row in rows[:4]] == [
        [], [], ["TPU v5e"], ["H200", "TPU v5e"]
    ]  # fmt: skip
    head, lines = table(ahead.shares_table(rows, [128, 4096]))
    assert head[1:5] == ["H200, 128", "H200, 4,096", "TPU v5e, 128", "TPU v5e, 4,096"]
    assert lines[0][1:5] == ["0.1 %", "1.2 %", "5 %", "5 %"]
    assert lines[1][1:5] == ["4.9 %", "**5.1 %**", "**20 %**", "**123 %**"]
    assert [line[-1] for line in lines] == ["–", "H200, TPU v5e", "–"]
    assert [line[-2] for line in lines] == ["–", "qr", "svd"]
    assert lines[2][1:3] == ["n ≤ d + 1", "1 %"]


def test_measured_shares_stand_beside_predicted_ones(ahead):
    """Joins rows of `step.measure`, as an accelerator would give them."""
    timed = lambda distance, batch, extra, framework="JAX": {
        "framework": framework,
        "distance": distance,
        "batch": batch,
        "ms_per_step": 10.0 * batch + (extra or 0.0),
        "distance_ms": extra,
    }
    measured = [
        timed("none", 1, None),
        timed("l2", 1, 0.5),
        timed("l2", 1, 5.0, "PyTorch compile"),
        timed("none", 2, None),
        timed("l2", 2, 4.0),
        {"framework": "JAX", "distance": "nst", "batch": 1, "note": "needs maps"},
    ]
    rows = [shares(name, b, 0.01, 0.01) for name in ("l2", "nst") for b in (1, 2)]
    found = ahead.joined(rows, measured)
    assert [row["measured"] for row in found] == [0.05, 0.2, None, None]
    head, lines = table(ahead.shares_table(found, [1, 2]))
    at = head.index("measured, 1")
    assert [line[at : at + 2] for line in lines] == [["5 %", "**20 %**"], ["–", "–"]]
    assert "measured, 1" not in ahead.shares_table(rows, [1, 2])


def test_the_page_has_the_share_of_every_distance(ahead):
    page = (BENCHMARKS / "README.md").read_text()
    below = page.partition("<!-- shares -->")[2].strip()
    head, lines = table(below.partition("\n\n")[0])
    assert [line[0] for line in lines] == [*DISTANCES, *ahead.CHEAPER]
    for line in lines:
        for device in ahead.roofline.DEVICES:
            cells = [c for h, c in zip(head, line, strict=True) if h.startswith(device)]
            marked = any("**" in cell for cell in cells[: len(ahead.SIZES)])
            assert marked == (device in line[-1]), line


@pytest.mark.bench
def test_shares_ahead(tmp_path):
    text, report = run(
        "ahead.py --batch-size 8 16 --width 2 --distances none l2 cw2 nst wkd_logits "
        "linear_projection",
        tmp_path / "ahead.json",
    )
    names = ["l2", "cw2", "nst", "wkd_logits", "linear_projection"]
    names += ["wkd_logits/iterations", "cw2/entropic"]
    head, lines = table("| distance" + text.partition("| distance")[2])
    assert [line[0] for line in lines[: len(names)]] == names
    rows = {(row["distance"], row["batch"]): row for row in report["rows"]}
    assert rows["linear_projection", 16]["note"] == "n ≤ d + 1"
    assert all(rows[name, 16]["counts"]["operations"] > 0 for name in names[:4])
    assert rows["cw2", 16]["passes"] >= 1
    entropic = rows["cw2/entropic", 16]["counts"]
    assert entropic["bytes"] < rows["cw2", 16]["counts"]["bytes"]
    step = [report["steps"][size]["operations"] for size in ("8", "16")]
    assert step[1] == pytest.approx(2 * step[0], rel=0.02)


@pytest.mark.bench
def test_ahead_without_a_compiler():
    if find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "ahead.py", "--target", "tpu-v5e"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "no compiler for tpu: pip install libtpu, of JAX's own version"


def test_peaks_of_devices():
    import workload

    kinds = ["NVIDIA H200", "NVIDIA H100 PCIe", "TPU v5 lite", "NVIDIA L40", "cpu"]
    assert [workload.peak_tflops(kind) for kind in kinds] == [989, 756, 197, None, None]


@pytest.mark.bench
def test_distances(tmp_path):
    text, report = run(
        "distances.py --n 8 20 --d 16 --classes 10 100 --rounds 2 --no-assert "
        "--distances w2/exact cw2/exact w2_gaussian cw2_gaussian linear_projection "
        "wkd_logits wkd_features",
        tmp_path / "distances.json",
    )
    head, lines = table(text)
    lines = lines[:20]  # the rest are the claims
    measured = [tuple(line[:4]) for line in lines]
    of_a_size = [
        ("w2/exact", "–"),
        ("cw2/exact", "10"),
        ("cw2/exact", "100"),
        ("w2_gaussian", "–"),
        ("cw2_gaussian", "10"),
        ("cw2_gaussian", "100"),
        ("linear_projection", "–"),
        ("wkd_logits", "10"),
        ("wkd_logits", "100"),
        ("wkd_features", "–"),
    ]
    assert measured == [(a, n, "16", b) for n in ("8", "20") for a, b in of_a_size]
    notes = [line[4] for line in lines if line[0] == "linear_projection"]
    assert notes[0] == "needs n > d + 1"
    for row in report["rows"]:
        if (row["distance"], row["n"]) != ("linear_projection", 8):
            assert row["value_ms"] > 0
            assert row["gradient_ms"] > 0
            assert row["memory"] >= 0
    # For each of two sizes, a claim about arrays, and claims about the time of two
    # distances with two students.
    assert len(report["claims"]) == 2 + 2 * 2 * 2
    assert all(claim[1] <= 1 for claim in report["claims"][:2])


def test_large_arrays_are_seen():
    import distances

    def pairs(x):  # [5, 5, 3], in a loop
        return jnp.sum((x[:, None, :] - x[None, :, :]) ** 2)

    def looped(x):
        return jax.lax.fori_loop(0, 3, lambda i, s: s + jax.jit(pairs)(x), 0.0)

    x = jnp.ones((5, 3))
    largest = lambda fn: max(distances.arrays_of(jax.make_jaxpr(fn)(x).jaxpr))
    assert largest(looped) == largest(jax.value_and_grad(pairs)) == 75
    assert largest(lambda x: x @ x.T) == 25


@pytest.mark.bench
def test_data(tmp_path):
    text, report = run("data.py --dataset digits --images 40", tmp_path / "data.json")
    head, rows = table(text)
    read = [[row[head.index(c)] for c in ("source", "load", "images")] for row in rows]
    digits = [["digits", "first", "1797"], ["digits", "again", "1797"]]
    assert read == [*digits, ["png", "first", "80"], ["png", "again", "80"]]
    assert all(row["seconds"] > 0 for row in report["rows"])
    assert report["streamed"] > 0
    assert "streamed: " in text


@pytest.mark.bench
def test_scale(tmp_path):
    text, report = run(
        "scale.py --n 8 40 --classes 3 30 --d 16 --rounds 2 --seconds 60 "
        f"--distances w2/exact cw2 kd linear_projection --plot {tmp_path / 'a.png'}",
        tmp_path / "scale.json",
    )
    head, rows = table(text)
    assert head[1:3] == ["n = 8", "n = 40"]
    assert rows[3][:2] == ["linear_projection", "n ≤ d + 1"]
    by_n, by_classes = report["rows"]["n"], report["rows"]["classes"]
    assert [row["n"] for row in by_n["w2/exact"]] == [8, 40]
    assert {name: [row["classes"] for row in rows] for name, rows in by_classes.items()
            } == {"cw2": [3, 30], "kd": [3, 30]}  # fmt: skip
    assert all(row["ms"] > 0 for row in by_n["cw2"])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_growth_of_memory_is_judged():
    """Compares with the largest matrix: n x n for 10 classes, k x k for more than n."""
    import scale

    def rows(*memories, n=(512, 1024), classes=(10, 10)):
        return [
            {"distance": "w2", "n": size, "classes": k, "memory": memory}
            for size, k, memory in zip(n, classes, memories, strict=True)
        ]

    grown = lambda *args, **options: scale.claims(rows(*args, **options), 64)[0][1]
    assert grown(4e6, 16e6) == pytest.approx(1)
    assert grown(4e6, 64e6) == pytest.approx(4)  # [n, n, d], but [n, n] is allowed
    more = {"n": (256, 256), "classes": (1000, 2000)}
    assert grown(4e6, 16e6, **more) == pytest.approx(1)
    assert scale.claims(rows(1e3, 1e6), 64) == []  # too small to judge


def test_only_the_cache_is_kept_between_first_steps(monkeypatch):
    import startup

    def first_steps(folder):
        (folder / "out" / "checkpoints" / "step-1").mkdir(parents=True)
        (folder / "cache").mkdir(exist_ok=True)
        found = list((folder / "cache").iterdir())
        (folder / "cache" / "program").touch()
        return {"teacher": 1.0 if found else 2.0}

    monkeypatch.setattr(startup, "first_steps", first_steps)
    steps = startup.measure_steps()
    assert steps == {"empty": {"teacher": 2.0}, "filled": {"teacher": 1.0}}


def test_claims_of_startup_are_judged():
    import startup

    times = lambda ours: {startup.BASE: [1.0, 2.0], startup.OURS: [ours, 2 * ours]}
    steps = lambda filled: {"empty": {"teacher": 2.0}, "filled": {"teacher": filled}}
    assert startup.broken(times(1.2), steps(1.0)) == []
    assert startup.broken(times(1.2), {}) == []
    assert startup.broken(times(1.4), {}) == ["the import takes 1.40 times, limit 1.3"]
    assert startup.broken(times(1.2), steps(3.0)) == [
        "the cache saves nothing: 3.0, 2.0 s"
    ]


@pytest.mark.bench
def test_startup(tmp_path):
    # Times are not asserted, because the machine may be busy.
    command = "startup.py --rounds 2 --no-steps --no-assert"
    text, report = run(command, tmp_path / "startup.json")
    head, rows = table(text)
    assert rows[-1][0] == "kddm_jax"
    assert len(report["imports"]["kddm_jax"]) == 2
