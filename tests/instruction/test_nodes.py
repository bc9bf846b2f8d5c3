"""Express and Edit Instruction: which model writes, what is sent and kept, the three prompts, what is refused."""

import comfy.model_management
import pytest
import tiny_models
import tiny_vlm
import torch
from instruction import fakes
from palimpsest.nodes.instruction import express, nodes
from palimpsest.nodes.instruction.edit_head import EditHead
from palimpsest.nodes.multimodal.encoder import MultimodalEncoder
from palimpsest.nodes.multimodal.vlm import load_vlm
from palimpsest.nodes.words import WITHOUT_WORDS
from tiny_models import execute

pytestmark = pytest.mark.usefixtures("inference")


def say(**given):
    return execute(nodes.ExpressInstruction, **{"image": tiny_models.picture(1, 40, 56), **given})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return MultimodalEncoder(
        load_vlm(tiny_vlm.write(tmp_path_factory.mktemp("vlm") / "idefics3", "idefics3"), "float32")
    )


# ---------------------------------------------------------------------------------------------------- who writes, what


def test_a_hosts_text_encoder_is_asked_and_its_answer_cleaned():
    writer = fakes.Writer()
    text, head, report = say(clip=writer, instruction="make it winter", max_tokens=50)
    assert text == "The park lies in snow. The cat is red."
    assert head is None
    assert writer.asked == [("what will this image be like if 'make it winter'", (1, 40, 56, 3))]
    assert writer.limits == [50]
    assert "sent: what will this image be like if 'make it winter'" in report
    assert fakes.ANSWER in report
    assert "(7 tokens)" in report


def test_a_long_answer_is_summarised_by_the_same_model():
    writer = fakes.Writer()
    text, _, report = say(clip=writer, summary_words=5)
    assert text == "Snow lies. Red cat."
    assert writer.asked[1][0].startswith("summarize the following paragraph in 5 words:\n\nThe park lies in snow.")
    assert writer.asked[1][1] is None
    assert writer.asked[1][0] in report
    assert say(clip=fakes.Writer(), summary_words=0)[0] == "The park lies in snow. The cat is red."


def test_every_picture_of_a_batch_gets_a_text():
    writer = fakes.Writer()
    text, _, report = say(clip=writer, image=tiny_models.picture(2, 40, 56), instruction="let it rest\nmake it winter")
    assert text.count("\n") == 1
    assert [sent for sent, _ in writer.asked] == [
        "what will this image be like if 'let it rest'",
        "what will this image be like if 'make it winter'",
    ]
    assert "picture 2 of 2" in report
    with pytest.raises(ValueError, match="instruction has 3 lines for 1 pictures"):
        say(clip=writer, instruction="a\nb\nc")


def test_a_model_that_does_not_see_is_refused():
    blind = fakes.Writer(sees=False)
    with pytest.raises(ValueError, match="did not see the picture"):
        say(clip=blind)
    assert blind.limits == []  # it was not asked to write about what it does not see
    with pytest.raises(ValueError, match="clip is Reader and writes no text"):
        say(clip=fakes.Reader())


def test_one_model_writes(encoder):
    with pytest.raises(ValueError, match="no language model is connected"):
        say()
    with pytest.raises(ValueError, match="clip and multimodal_encoder are connected, one writes"):
        say(clip=fakes.Writer(), multimodal_encoder=encoder)
    with pytest.raises(ValueError, match="mgie holds no language model"):
        say(mgie=EditHead("head", None, None))
    with pytest.raises(ValueError, match="nothing is left"):
        say(clip=fakes.Writer("<think>forever"))


def test_the_encoders_language_model_writes(encoder):
    text, head, report = say(multimodal_encoder=encoder, instruction="the dog is running", max_tokens=8)
    assert text
    assert head is None
    assert "<picture>what will this image be like if 'the dog is running'<end_of_utterance>" in report
    other = say(multimodal_encoder=encoder, image=tiny_models.picture(1, 40, 56, seed=3), max_tokens=8)[2]
    assert say(multimodal_encoder=encoder, instruction="the dog is running", max_tokens=8)[2] == report
    assert other != report


def test_a_run_is_cancelled_within_an_operation(encoder, monkeypatch):
    calls, real = [], express.host.ProgressText.update

    def update(self, text, now=False):
        calls.append(text)
        comfy.model_management.interrupt_current_processing(True)
        return real(self, text, now)

    monkeypatch.setattr(express.host.ProgressText, "update", update)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        say(multimodal_encoder=encoder, max_tokens=8)
    assert len(calls) == 1
    assert "1 of at most 8 tokens" in calls[0]
    comfy.model_management.interrupt_current_processing(False)


# --------------------------------------------------------------------------------------------------------- the prompts


def test_the_three_prompts_of_a_text():
    positive, without, negative, report = execute(
        nodes.EditInstruction, clip=fakes.Reader(), expressed="The cat sleeps.\n"
    )
    want = fakes.Reader().encode_from_tokens_scheduled("The cat sleeps.")[0][0]
    assert torch.equal(positive[0][0], want)
    assert torch.equal(without[0][0], fakes.Reader().encode_from_tokens_scheduled("")[0][0])
    assert torch.equal(negative[0][0], without[0][0])
    assert report.startswith("The cat sleeps.")


def test_a_written_text_wins_and_nothing_is_asked_before_it():
    node = nodes.EditInstruction
    waiting = {"expressed": None, "edit_head": None}  # connected, and not run yet
    assert node.check_lazy_status(text="", route="expressed text", **waiting) == ["expressed"]
    assert node.check_lazy_status(text="mine", route="expressed text", **waiting) == []
    assert node.check_lazy_status(text="mine", route="edit head", **waiting) == ["edit_head"]
    assert node.check_lazy_status(text="", route="edit head", expressed=None) == []
    assert node.check_lazy_status(text="", expressed="theirs") == []
    lazy = {entry.id for entry in node.define_schema().inputs if entry.lazy}
    assert lazy == {"expressed", "edit_head"}
    report = execute(node, clip=fakes.Reader(), text="mine", expressed="theirs")[3]
    assert report.startswith("mine\n")


def test_a_line_for_each_picture_is_a_row():
    long = "A sentence that is longer than forty letters, so it has more tokens."
    positive, *_ = execute(nodes.EditInstruction, clip=fakes.Reader(), text=f"short\n{long}")
    (tensor, extra), read = positive[0], fakes.Reader().encode_from_tokens_scheduled
    assert tensor.shape == (2, 8, 24)
    assert torch.equal(tensor[0], torch.cat([read("short")[0][0][0]] * 2))
    assert torch.equal(tensor[1], read(long)[0][0][0])
    assert extra["pooled_output"].shape == (2, 3)


def test_what_edit_instruction_refuses():
    with pytest.raises(ValueError, match="connect the checkpoint's clip"):
        execute(nodes.EditInstruction, text="mine")
    with pytest.raises(ValueError, match="there is no text"):
        execute(nodes.EditInstruction, clip=fakes.Reader(), expressed=" ")
    with pytest.raises(ValueError, match="needs MGIE's edit head"):
        execute(nodes.EditInstruction, route="edit head", text="mine")
    assert WITHOUT_WORDS.startswith("palimpsest_")
