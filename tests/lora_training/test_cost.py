"""What a step of Train LoRA costs, counted on tensors without storage."""

from benchmarks import counting, counting_lora


def test_a_step_keeps_less_with_checkpointing_and_runs_its_blocks_again():
    model = counting.build(counting.TINY)
    plain, checkpointed = (counting_lora.step(model, counting.TINY, f"rank 32{end}") for end in ("", ", checkpointing"))
    assert checkpointed.saved < plain.saved / 5
    assert plain.flops < checkpointed.flops < 1.5 * plain.flops
