"""AdamW in 32 and in 8 bits: which library is taken, what it is called, and going on from what it remembered."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from palimpsest.nodes.training import optimisers

IN_8_BITS = SimpleNamespace(optimiser=optimisers.ADAMW_8BIT, weight_decay=0.01)
IN_32_BITS = SimpleNamespace(optimiser=optimisers.ADAMW, weight_decay=0.01)
SHAPES = [(320, 16), (33,), (3, 1366)]  # for 8 bits; too small; no multiple of a block


class Stub(torch.optim.AdamW):
    """Stands for a library's AdamW with states of 8 bits; as torchao's it takes rates that are tensors only."""

    block_size = 256

    def step(self, closure=None):
        if self.strict and not all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups):
            raise RuntimeError("lr was changed to a non-Tensor object")
        return super().step(closure)

    strict = False


def install(monkeypatch, *libraries):
    """Only these libraries can be imported, as stubs."""
    for name in ("bitsandbytes", "torchao"):
        module = ModuleType(name)
        module.__version__ = "9.9"
        module.optim = ModuleType(f"{name}.optim")
        module.optim.AdamW8bit = type("AdamW8bit", (Stub,), {"strict": name == "torchao"})
        there = name in libraries
        monkeypatch.setitem(sys.modules, name, module if there else None)
        monkeypatch.setitem(sys.modules, f"{name}.optim", module.optim if there else None)


def weights(seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=drawn).requires_grad_() for shape in SHAPES]


def made(tensors, settings=IN_8_BITS):
    return optimisers.optimiser_for([{"params": tensors, "lr": 1e-3, "start": 1e-3}], settings)


def teach(tensors, optimiser, steps):
    """Steps with gradients and rates that follow from the step's number."""
    for step in steps:
        drawn = torch.Generator().manual_seed(step)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=drawn)
        for group in optimiser.param_groups:
            group["lr"] = group["start"] / (step + 1)
        optimiser.step()


@pytest.mark.parametrize(
    ("libraries", "name"),
    [
        (("bitsandbytes", "torchao"), "AdamW8bit of bitsandbytes 9.9, 1 of 3 tensors too small for 8 bits"),
        (("torchao",), "AdamW8bit of torchao 9.9, 2 of 3 tensors too small for 8 bits or no multiple of 256"),
        ((), "AdamW (for 8 bits install bitsandbytes or torchao)"),
    ],
)
def test_the_first_library_that_is_there_is_taken_and_named(libraries, name, monkeypatch):
    install(monkeypatch, *libraries)
    tensors = weights()
    found = made(tensors)
    assert found.name == name
    teach(tensors, found.steps, range(2))  # rates are plain numbers for each
    assert made(weights(), IN_32_BITS).name == "AdamW"


@pytest.mark.parametrize("library", ["torch", "bitsandbytes", "torchao"])
def test_going_on_is_as_if_it_had_never_stopped(library, monkeypatch):
    """The two packages for real, where they are installed."""
    settings = IN_32_BITS
    if library != "torch":
        pytest.importorskip(library)
        monkeypatch.setitem(sys.modules, *{"bitsandbytes": ("torchao", None)}.get(library, ("bitsandbytes", None)))
        settings = IN_8_BITS
    whole = weights()
    teach(whole, made(whole, settings).steps, range(6))
    first = weights()
    before = made(first, settings)
    teach(first, before.steps, range(3))
    kept = optimisers.state_of(before.steps)
    assert all(type(value) is torch.Tensor for value in kept.values())
    assert library in before.name or library == "torch"
    assert any(value.dtype is torch.uint8 for value in kept.values()) == (library != "torch")

    second = [tensor.detach().clone().requires_grad_() for tensor in first]
    after = made(second, settings)
    optimisers.restore(after.steps, kept)
    assert all(torch.equal(*pair) and pair[0].grad is None for pair in zip(second, first, strict=True))
    assert all(torch.equal(value, kept[name]) for name, value in optimisers.state_of(after.steps).items())
    teach(second, after.steps, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(second, whole, strict=True))


def test_what_had_no_gradient_yet_has_nothing_to_remember():
    tensors = weights()
    optimiser = made(tensors, IN_32_BITS).steps
    tensors[1].grad = torch.ones(SHAPES[1])
    optimiser.step()
    other = made(weights(), IN_32_BITS).steps
    optimisers.restore(other, optimisers.state_of(optimiser))
    assert {name.split(".")[0] for name in optimisers.state_of(other)} == {"1"}


def test_the_memory_of_another_optimiser_is_refused():
    tensors = weights()
    optimiser = made(tensors, IN_32_BITS).steps
    teach(tensors, optimiser, range(1))
    kept = optimisers.state_of(optimiser)
    for other, message in [
        ({"3.step": kept["0.step"]}, "made with other layers"),
        ({"0.state1": kept["0.exp_avg"]}, "another library for 8 bits"),
        ({**kept, "0.exp_avg": kept["1.exp_avg"]}, "another library for 8 bits"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimisers.restore(made(weights(), IN_32_BITS).steps, other)
