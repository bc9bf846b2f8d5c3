"""An edit head in Train Instruction: with its tokens, beside a model or alone, and read back by Load MGIE."""

import comfy.model_management
import harness
import pytest
import tiny_mgie
import tiny_models
import torch
from instruction_training import teaching
from instruction_training.teaching import teach, teach_head
from lora_training.teaching import text_encoder
from palimpsest.nodes.instruction import heads, loading, rows
from palimpsest.nodes.instruction import teaching as hearing
from palimpsest.nodes.instruction.folder import MGIE, MgieFolder
from palimpsest.nodes.instruction.llava import load_mgie
from palimpsest.nodes.instruction.nodes import EditInstruction, ExpressInstruction, LoadMGIE
from palimpsest.nodes.instruction_training import fit
from palimpsest.nodes.instruction_training import head as learning_head
from palimpsest.nodes.instruction_training.files import STATES
from palimpsest.nodes.instruction_training.settings import HEAD_ALONE, WHOLE
from safetensors.torch import load_file

EXPRESSED = ("a blue cat", "a cat in the snow", "a red dog sitting", "a woman in the park")
ALONE = {"method": HEAD_ALONE, "expressed": list(EXPRESSED), "head_rate": 1e-2}


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path, mgie_folder):
    teaching.use_folders(monkeypatch, tmp_path)
    monkeypatch.setattr(type(MGIE), "path", lambda self, name: mgie_folder)
    return tmp_path


@pytest.fixture(scope="module")
def mgie_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_mgie.HEAD, "context", 24)  # of the tiny models
        return tiny_mgie.write(tmp_path_factory.mktemp("mgie") / "mgie")


@pytest.fixture(scope="module")
def model():
    return tiny_models.unet("sd15_edit")


@pytest.fixture(scope="module")
def clip():
    return text_encoder()


def mgie(file=heads.OF_FOLDER):
    """The edit head of Load MGIE."""
    with torch.inference_mode():
        return LoadMGIE.execute(folder="mgie", dtype="float32", head_file=file).args[1]


def new_head():
    """One without an edit head of its own."""
    head = mgie()
    return type(head)(head.name, None, None, head.model)


def prompts(head, text="a cat in the snow"):
    """What the nodes make of a picture and a text."""
    with torch.inference_mode():
        chosen = {"instruction": "make it winter", "max_tokens": 8}
        _, read, _ = tiny_models.execute(ExpressInstruction, image=tiny_models.picture(1, 40, 40), mgie=head, **chosen)
        positive, without, *_ = tiny_models.execute(EditInstruction, route="edit head", edit_head=read, text=text)
    return positive[0][0], without[0][0]


def file_of(folders, file):
    return load_file(folders / "palimpsest_edit_heads" / file)


def same(folders, first, second):
    a, b = file_of(folders, first), file_of(folders, second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- what it learns, and what is read back


@pytest.mark.parametrize("image_tokens", [True, False])
def test_a_head_alone_learns_and_is_read_back_bit_for_bit(model, clip, folders, image_tokens):
    given = mgie()
    before, weights = prompts(given), {n: t.clone() for n, t in given.model.loaded().llava.state_dict().items()}
    out, *_, report, file, head = teach_head(model, clip, edit_head=given, image_tokens=image_tokens, **ALONE)
    assert not out.patches
    assert "edit head alone" in report
    assert f"edit head in {file} (Load MGIE)" in report
    found = prompts(head)
    harness.assert_acts(found[0], before[0])
    for ours, theirs in zip(found, prompts(mgie(file)), strict=True):
        assert torch.equal(ours, theirs)
    assert (rows.GIVEN in file_of(folders, file)) is image_tokens
    for one, other in zip(prompts(given), before, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(weights[name], tensor) for name, tensor in given.model.loaded().llava.state_dict().items())


def test_it_learns_to_say_what_the_text_encoder_says(model, clip):
    """Steps without a call of the U-Net come nearer to the encoder's prompts."""
    settings = {"edit_head": new_head(), "head_width": 16, "head_layers": 1, "drop_text": 0.0, "drop_both": 0.0}
    few = {"steps": 30, "text_steps": 30, "keep_state": "none", "image_tokens": False}
    *_, report, _, head = teach_head(model, clip, **ALONE | settings | few)
    first, last = (
        float(word.rstrip(";,")) for word in report.split("loss ")[1].split(" -> ")[:2] for word in [word.split()[0]]
    )
    assert last < 0.9 * first
    assert head.network.config.width == 16


def test_gradients_reach_head_and_tokens_through_the_unet(model, clip, folders):
    """Head and tokens differ after one step."""
    *_, file = teach(model, clip, edit_head=mgie(), **ALONE | {"steps": 1, "accumulation": 4})
    own, found = load_file(MGIE.path("mgie") / "mllm.safetensors"), file_of(folders, file)
    changed = [key for key in found if key in own and not torch.equal(found[key], own[key].half())]
    assert "edit_head.query" in changed
    assert "edit_head.llm2hid.weight" in changed
    assert "emb" in changed
    assert torch.equal(found["emb"], found[rows.GIVEN])


def test_beside_a_unet_both_learn(model, clip, folders):
    whole = {
        "method": WHOLE,
        "learning_rate": 1e-3,
        "masks": [harness.half()],
        "words_inside": True,
        "blend_layers": "out",
    }
    out, *_, report, file, head = teach_head(model, clip, edit_head=mgie(), **ALONE | whole)
    assert out.patches
    assert (folders / "diffusion_models" / file).is_file()
    assert (folders / "palimpsest_edit_heads" / file).is_file()
    assert (folders / "palimpsest_blend" / file).is_file()
    assert "weights for Feature Blend" in report
    assert torch.equal(prompts(head)[0], prompts(mgie(file))[0])


def test_the_language_model_says_what_is_not_written(model, clip, folders, monkeypatch):
    monkeypatch.setattr("palimpsest.nodes.instruction_training.expressing.MOST", 6)
    said = teach(model, clip, edit_head=mgie(), **ALONE | {"expressed": [""], "steps": 1})[-1]
    written = teach(model, clip, edit_head=mgie(), **ALONE | {"steps": 1})[-1]
    assert not same(folders, said, written)


def test_states_with_a_gradient_are_those_without(mgie_folder):
    language = load_mgie(MgieFolder(mgie_folder), "float32")
    reading, *_ = language.write(tiny_models.picture(1, 40, 60)[0], "what", 5, lambda text, tokens: None)
    wanted = language.read(reading, "a cat in the snow")
    language.load(64)
    states, loss = hearing.hear(language, wanted)
    torch.testing.assert_close(states, wanted.states, rtol=1e-4, atol=1e-4)
    assert loss > 0


# ---- its habits


@pytest.mark.parametrize("more", [{}, {"adversarial": 0.1, "text_steps": 3, "method": "LoRA"}])
def test_a_resumed_training_ends_as_one_that_was_never_stopped(model, clip, folders, more):
    settings = ALONE | {"steps": 6, "save_every": 2, "keep_state": "with every file", "edit_head": mgie()} | more
    whole = teach(model, clip, **settings)[-1]
    states = sorted(path.name for path in (folders / STATES.folder).glob("*_s*"))
    assert len(states) == 2
    for state in states:
        assert same(folders, whole, teach(model, clip, resume=state, **settings)[-1])


def test_cancelled_and_previewed(model, clip, folders, monkeypatch):
    real = fit.FitInstruction.after

    def cancel(self, step):
        real(self, step)
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(fit.FitInstruction, "after", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        teach(model, clip, edit_head=mgie(), filename="half", preview_every=1, **ALONE)
    assert (folders / "palimpsest_edit_heads" / "half_00001.safetensors").is_file()
    assert (folders / STATES.folder / "half_00001.safetensors").is_file()


def test_an_adversary_acts_and_its_absence_is_the_plain_training(model, clip, folders):
    plain = teach(model, clip)[-1]
    acted = teach(model, clip, adversarial=0.5)[-1]
    again = teach(model, clip, adversarial=0.5)[-1]
    found = [load_file(folders / "loras" / file) for file in (plain, acted, again)]
    assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert all(torch.equal(found[1][key], found[2][key]) for key in found[1])


# ---- what it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": HEAD_ALONE}, "method 'edit head alone' trains an edit head: connect edit_head"),
        ({"edit_head": "new", "head_width": 18}, "head_width is 18, it must be a multiple of 4"),
        ({"edit_head": "none"}, "edit_head holds no language model"),
        ({"edit_head": "own", "expressed": ["a", "b"]}, "2 texts in expressed for 4 pictures"),
    ],
)
def test_bad_input_is_a_sentence(model, clip, changes, message):
    made = {"new": new_head, "own": mgie, "none": lambda: loading.EditHead("x", None, None)}
    changes = changes | ({"edit_head": made[changes["edit_head"]]()} if "edit_head" in changes else {})
    with pytest.raises(ValueError, match=message):
        teach(model, clip, **changes)


def test_sdxl_is_refused():
    with pytest.raises(ValueError, match="makes no pooled output"):
        learning_head.require_readable(tiny_models.unet("sdxl_edit"))


def test_a_head_of_another_language_model_is_refused(mgie_folder):
    other = loading.head_in(MgieFolder(mgie_folder))
    with pytest.raises(ValueError, match="reads states of 32 channels, x has 64"):
        loading.require_fitting(other, 64, "x")
