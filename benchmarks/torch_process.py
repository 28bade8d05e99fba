"""PyTorch in a process of its own, as the programs of `step.py`.

In one process with XLA the threads of both wait for each other: PyTorch's step takes
1.4 times as long there as alone.  Here the other side sleeps while one is timed, and
PyTorch may belong to another Python than JAX.
"""

import json
import subprocess
import sys
from pathlib import Path

from workload import Setting

SCRIPT = Path(__file__).with_name("torch_step.py")


class TorchProcess:
    """The process; `hello` is what it says of itself.

    Attributes:
      hello: "version", "threads", "cuda" and the "distances" that it knows.
    """

    def __init__(self, python: str | None = None, threads: int | None = None):
        """Starts it.

        Args:
          python: the interpreter; None is this one.
          threads: of PyTorch; None is its own choice.

        Raises:
          OSError: there is no such interpreter.
          RuntimeError: the process ended, without PyTorch for example.
        """
        command = [python or sys.executable, str(SCRIPT)]
        self.process = subprocess.Popen(
            [*command, str(threads)] if threads else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        if not line:
            self.close()
            status = self.process.returncode
            raise RuntimeError(f"{command[0]} {SCRIPT.name} ended with status {status}")
        self.hello = json.loads(line)

    def ask(self, **message: object) -> dict:
        """Sends a message and waits for the answer.

        Raises:
          RuntimeError: the process failed at it, or ended.
        """
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"error": "ended"}')
        except BrokenPipeError:
            answer = {"error": "ended"}
        if "error" in answer:
            raise RuntimeError(f"PyTorch: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process, and with it its memory."""
        self.process.communicate()


class TorchProgram:
    """The step in PyTorch; a call makes as many steps as ours and waits."""

    iterations = None  # of a solver: there is none

    def __init__(
        self,
        process: TorchProcess,
        setting: Setting,
        distance: str,
        *,
        weight: float,
        steps: int,
        compiled: bool,
    ):
        """Makes networks and step, and runs once.

        Raises:
          RuntimeError: PyTorch fails at it.
        """
        made = process.ask(
            make=list(setting),
            distance=distance,
            weight=weight,
            steps=steps,
            compiled=compiled,
        )
        self.first_s = made["first_s"]
        self.parameters, self.gb = tuple(made["parameters"]), made["memory_gb"]
        self.process, self.index, self.losses = process, made["index"], made["losses"]

    def __call__(self) -> None:
        """Makes the steps of one dispatch; the answer has their losses."""
        self.losses.extend(self.process.ask(run=self.index)["losses"])

    def memory_gb(self) -> float | None:
        """The most that was allocated up to the first call, on CUDA."""
        return self.gb
