"""Data-parallel training on a shared CPU: single-threaded processes that average their gradients in shared memory.

Two threads of one process wait for each other at every operation; where a neighbour takes a core now and then, that
costs far more than the neighbour does. Processes that meet once per step do not have this problem.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor


class Averager:
    """Replaces each process's gradients by their mean. With one process it does nothing."""

    def __init__(self, numbers: int, processes: int = 1):
        self.rank, self.processes, self.step = 0, processes, 0
        self.parameters: list[Tensor] = []
        if processes > 1:
            # Two buffers in turn: a process may fill the next one while another still reads the last.
            self.buffers = [torch.zeros(processes, numbers).share_memory_() for _ in range(2)]
            self.progress = torch.zeros(2).share_memory_()
            self.barrier = multiprocessing.get_context("spawn").Barrier(processes)

    def join(self, rank: int, parameters: Iterable[Tensor]) -> None:
        self.rank, self.parameters = rank, list(parameters)

    def average(self) -> None:
        """Call once per step, after backward()."""
        if self.processes == 1:
            return
        buffer = self.buffers[self.step % 2]
        self.step += 1
        own = torch.cat([parameter.grad.reshape(-1) for parameter in self.parameters])
        buffer[self.rank, : len(own)] = own
        self.barrier.wait()
        mean, start = buffer.mean(0), 0
        for parameter in self.parameters:
            parameter.grad.copy_(mean[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def agree(self, progress: float) -> float:
        """The first process's progress of the step before, so that all processes stop at the same step."""
        if self.processes == 1:
            return progress
        if self.rank == 0:
            self.progress[self.step % 2] = progress
        return self.progress[(self.step + 1) % 2].item() if self.step else 0.0


def run(work: Callable, numbers: int, processes: int, *arguments) -> None:
    """Call `work(averager, rank, *arguments)` in each of the processes; `numbers` is the count of trained numbers."""
    averager = Averager(numbers, processes)
    if processes == 1:
        work(averager, 0, *arguments)
        return
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_single_threaded, args=(work, averager, rank, arguments), daemon=True)
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            for other in workers:
                other.terminate()
            raise RuntimeError(f"train: a process ended with code {worker.exitcode}; its message is above")


def _single_threaded(work: Callable, averager: Averager, rank: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(averager, rank, *arguments)


def _end_with_parent() -> None:
    """However the parent ends, also killed: else its workers would train on, unseen."""
    multiprocessing.parent_process().join()
    os._exit(1)
