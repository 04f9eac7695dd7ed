"""Time the training step of `_accelerator_step` in PyTorch, under torch.compile."""

import time
from functools import partial
from typing import NamedTuple

import numpy as np

from benchmarks._accelerator_checks import Check, Finding, Setting, Skipped
from benchmarks._accelerator_step import NUM_CLASSES
from benchmarks.training_step import DEVIATION, LEARNING_RATE, MEAN


class Case(NamedTuple):
    """A batch of CIFAR-10's size in one dtype, eager or under torch.compile."""

    batch: int
    dtype: str
    compiled: bool = True
    steps: int = 40


CASES = (
    Case(128, "bfloat16"),
    Case(512, "bfloat16"),
    Case(128, "bfloat16", compiled=False),
    Case(128, "float32"),
)
TINY = (Case(8, "float32", compiled=False, steps=2),)
STAGES = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))


def checks(setting: Setting) -> list[Check]:
    """Return a check for each batch size and dtype."""
    cases, stages = (TINY, ((4, 1),)) if setting.tiny else (CASES, STAGES)
    return [
        Check(
            f"ResNet18, batch {case.batch}, {case.dtype}, "
            f"{'torch.compile' if case.compiled else 'eager'}",
            partial(_step, case, stages),
        )
        for case in cases
    ]


def network(stages=STAGES):
    """Return ResNet18 for small images, without torchvision: a 3x3 stem, no pooling."""
    from torch import nn

    first, last = stages[0][0], stages[-1][0]
    layers = [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    channels = [first, *(stage[0] for stage in stages)]
    layers += [_block(c_in, *stage) for c_in, stage in zip(channels, stages, strict=False)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, NUM_CLASSES))
    return nn.Sequential(*layers, *head)


def _block(c_in: int, channels: int, stride: int):
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(
                nn.Conv2d(c_in, channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
                nn.BatchNorm2d(channels),
            )
            self.shortcut = nn.Identity()
            if stride != 1 or c_in != channels:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(c_in, channels, 1, stride, bias=False),
                    nn.BatchNorm2d(channels),
                )

        def forward(self, x):
            return torch.relu(self.branch(x) + self.shortcut(x))

    return Block()


def _step(case: Case, stages) -> Finding:
    try:
        import torch
    except ImportError as error:
        raise Skipped(f"PyTorch is missing: {error}") from None

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    step = _training_step(case, stages, device)
    order = torch.randperm(case.batch * case.steps, device=device).split(case.batch)
    seconds = []
    for _ in range(4):  # the first compiles
        started = time.perf_counter()
        for index in order:
            loss = step(index)
        loss = loss.item()  # waits for the device
        seconds.append((time.perf_counter() - started) / case.steps)
    median = float(np.median(seconds[1:]))
    details = {
        "images_per_s": case.batch / median,
        "compile_s": case.steps * (seconds[0] - median),
        "device": device,
        "torch": torch.__version__,
    }
    return Finding(bool(np.isfinite(loss)), 1e3 * median, "ms/step", details)


def _training_step(case: Case, stages, device: str):
    """Return a function of the indices of a batch: one step on images of noise."""
    import torch

    torch.manual_seed(0)
    model = network(stages).to(device).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, fused=device == "cuda"
    )
    count = case.batch * case.steps
    shape = (count, 3, 32, 32)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(0, NUM_CLASSES, (count,), device=device)
    dtype = getattr(torch, case.dtype)

    def step(index):
        x = (images[index].float() / 255 - MEAN) / DEVIATION
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(model(x), labels[index])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return torch.compile(step) if case.compiled else step
