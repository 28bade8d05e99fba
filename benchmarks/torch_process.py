"""Runs PyTorch in its own process, as programs of `step.py`.

In one process with XLA, the threads of both wait for each other, and PyTorch's step
takes 1.4 times as long as alone.  Here one side sleeps while the other is timed, and
PyTorch may be installed in another Python than JAX.
"""

import json
import subprocess
import sys
from pathlib import Path

from workload import Setting

SCRIPT = Path(__file__).with_name("torch_step.py")


class TorchProcess:
    """Runs and asks the process.

    Attributes:
      hello: its first message: "version", "threads", "cuda" and its "distances".
    """

    def __init__(self, python: str | None = None, threads: int | None = None):
        """Starts the process.

        Args:
          python: path of the interpreter; None is this one.
          threads: number of PyTorch's threads; None is PyTorch's default.

        Raises:
          OSError: if there is no such interpreter.
          RuntimeError: if the process ended, for example without PyTorch.
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
          RuntimeError: if the process failed or ended.
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
        """Ends the process and frees its memory."""
        self.process.communicate()


class TorchProgram:
    """Runs the step in PyTorch; a call makes as many steps as ours and waits."""

    iterations = None  # there is no solver

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
          RuntimeError: if PyTorch fails.
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
        """Makes the steps of one dispatch and receives their losses."""
        self.losses.extend(self.process.ask(run=self.index)["losses"])

    def memory_gb(self) -> float | None:
        """Returns the peak allocation before the first call, on CUDA."""
        return self.gb
