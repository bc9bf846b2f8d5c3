"""The host's own tokenizers and a small Qwen3-VL of its classes: who is shown the picture, what is sent, who writes."""

import comfy.model_management
import pytest
import tiny_models
import torch
from palimpsest.nodes.instruction import nodes
from palimpsest.nodes.instruction.writers import HostWriter, sees
from tiny_models import execute

pytestmark = pytest.mark.usefixtures("inference")
qwen3vl = pytest.importorskip("comfy.text_encoders.qwen3vl", reason="this ComfyUI has no Qwen3-VL")


@pytest.fixture
def clip(monkeypatch):
    from instruction import tiny_qwen

    return tiny_qwen.clip(monkeypatch)


def test_qwen3vl_sees_and_writes(clip):
    say = {"clip": clip, "instruction": "make it winter", "max_tokens": 8, "summary_words": 0}
    text, _, report = execute(nodes.ExpressInstruction, image=tiny_models.picture(1, 64, 96), **say)
    assert text
    sent = "<|im_start|>user\n<|vision_start|><picture><|vision_end|>what will this image be like if 'make it winter'"
    assert sent in report
    assert execute(nodes.ExpressInstruction, image=tiny_models.picture(1, 64, 96), **say)[2] == report
    other = execute(nodes.ExpressInstruction, image=tiny_models.picture(1, 64, 96, seed=5) * 0.2, **say)[2]
    assert other != report


def test_it_ends_within_an_operation_when_cancelled(clip):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        HostWriter(clip).write(torch.rand(64, 64, 3), "what?", 8, lambda text, tokens: None)
    comfy.model_management.interrupt_current_processing(False)


def test_the_picture_is_passed_over_by_qwen25vl_and_sd():
    from comfy.sd1_clip import SD1Tokenizer
    from comfy.text_encoders.qwen_image import QwenImageTokenizer

    picture = {"image": torch.rand(1, 64, 64, 3), "skip_template": False, "min_length": 1}
    assert sees(qwen3vl.Qwen3VLTokenizer().tokenize_with_weights("a cat", **picture))
    assert not sees(QwenImageTokenizer().tokenize_with_weights("a cat", **picture))
    assert not sees(SD1Tokenizer().tokenize_with_weights("a cat", **picture))
