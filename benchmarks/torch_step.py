"""Makes the same step in idiomatic PyTorch, for the comparison of `step.py`.

It uses channels last, uint8 images on the device, crop and flip of the whole batch with
one gather, SGD with Nesterov momentum, and autocast for bfloat16.

As a program it answers the JSON lines of `torch_process.py` and needs no JAX.
"""

import json
import os
import sys
import time

import torch
import torch.nn.functional as F
import torch_resnet
from workload import CLASSES, LEARNING_RATE, MEAN, STD, Data, Setting, make_data


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Converts uint8 ``[b, h, w, c]`` to float ``[b, c, h, w]``, channels last."""
    return ((images.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


def augment(images: torch.Tensor, padding: int = 4) -> torch.Tensor:
    """Crops and flips uint8 images ``[b, h, w, c]`` at random and normalises them."""
    b, h, w, _ = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, b, 1), device=device)
    flip = torch.rand((b, 1), device=device) < 0.5
    rows = top + torch.arange(h, device=device)  # [b, h]
    columns = torch.arange(w, device=device)
    columns = left + torch.where(flip, w - 1 - columns, columns)  # [b, w]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    each = torch.arange(b, device=device)[:, None, None]
    return normalize(padded[each, rows[:, :, None], columns[:, None, :]])


def gaussian_wasserstein(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Computes Gaussian W2 by the nuclear norm, as `kddm_jax`."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    n, m = len(x), len(y)
    traces = (x * x).sum() / n + (y * y).sum() / m
    fidelity = torch.linalg.svdvals(x @ y.T).sum() / (n * m) ** 0.5
    return ((mean_x - mean_y) ** 2).sum() + traces - 2 * fidelity


def none(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Uses the teacher's features without a distance; else it may be left out."""
    del x
    return y.mean()


DISTANCES = {"none": none, "w2_gaussian": gaussian_wasserstein}


class TorchStep:
    """Runs the step in PyTorch; a call makes as many steps as ours and waits."""

    def __init__(
        self,
        setting: Setting,
        distance: str,
        data: Data,
        *,
        weight: float,
        compiled: bool,
    ):
        """Makes networks and step, and runs once."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        before = self._allocated(reset=True)
        options = {"stem": setting.stem, "width": setting.width, "num_classes": CLASSES}
        self.student, self.teacher = [
            torch_resnet.ResNet(name, **options).to(
                self.device, memory_format=torch.channels_last
            )
            for name in ("resnet18", "resnet34")
        ]
        images, labels, indices = map(torch.as_tensor, data)
        self.images = images.to(self.device)
        self.labels = labels.long().to(self.device)
        self.indices = indices.to(self.device)
        torch_resnet.calibrate(self.teacher, normalize(self.images[:128]))
        self.teacher.eval()
        self.half = setting.dtype == "bfloat16"
        self.distance, self.weight = DISTANCES[distance], weight
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True
        )
        self.losses = []

        start = time.perf_counter()
        self()
        self.first_s = time.perf_counter() - start
        peak = self._allocated()
        self.gb = None if peak is None else (peak - before) / 1e9

    def _loss(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = augment(self.images[index])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                _, y = self.teacher(inputs)
            logits, x = self.student(inputs)
        loss = F.cross_entropy(logits.float(), self.labels[index])
        value = self.distance(x, y)
        return loss + self.weight * value, value.detach()

    def _step(self, index: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.loss(index)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def __call__(self) -> None:
        """Makes the steps of one dispatch and waits by reading the losses."""
        losses = torch.stack([self._step(index) for index in self.indices])
        self.losses.extend(losses.tolist())

    def parameters(self) -> tuple[int, int]:
        """Counts the parameters of student and teacher."""
        models = (self.student, self.teacher)
        return tuple(sum(p.numel() for p in model.parameters()) for model in models)

    def memory_gb(self) -> float | None:
        """Returns the peak allocation before the first call, on CUDA."""
        return self.gb

    def _allocated(self, reset: bool = False) -> int | None:
        if self.device.type != "cuda":
            return None
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()


def answer(message: dict, programs: list[TorchStep]) -> dict:
    """Answers a message: makes a program or runs one."""
    if "run" in message:
        program = programs[message["run"]]
        program.losses.clear()
        program()
        return {"losses": program.losses}
    setting = Setting(*message["make"])
    options = {key: message[key] for key in ("weight", "compiled")}
    data = make_data(setting.batch, message["steps"])
    program = TorchStep(setting, message["distance"], data, **options)
    programs.append(program)
    return {
        "index": len(programs) - 1,
        "first_s": program.first_s,
        "losses": program.losses,
        "parameters": program.parameters(),
        "memory_gb": program.memory_gb(),
    }


def serve() -> None:
    """Answers until the input ends; PyTorch's output goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: dict) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    say(
        {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
            "distances": list(DISTANCES),
        }
    )
    programs = []
    for line in sys.stdin:
        try:
            say(answer(json.loads(line), programs))
        except Exception as error:  # often too little memory; the next program may fit
            say({"error": repr(error)[:300]})


if __name__ == "__main__":
    serve()
