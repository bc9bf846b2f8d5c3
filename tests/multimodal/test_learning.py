"""The training of the pocket multimodal encoder: what each lesson changes, that it goes on where it stopped, files."""

import pytest
import torch
from benchmarks import multimodal_pocket as learning
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.vlm import load_vlm

LESSONS = {"see": ("vlm.", "heads."), "say": ("connector.",), "read": ("lora.",), "draw": ("connector.", "lora.")}

pytestmark = pytest.mark.usefixtures("comfy_host_path")


@pytest.fixture(scope="module")
def training():
    """The module under test, which imports its neighbour by its bare name, as programs of that folder do."""
    import sys

    sys.modules.setdefault("multimodal_pocket", learning)
    from benchmarks import multimodal_learning

    return multimodal_learning


@pytest.fixture
def trainer(training, model, data, tmp_path):
    """Makes trainers in a folder."""

    def make(name, steps):
        work = tmp_path / name
        vlm = load_vlm(learning.write_vlm(work / learning.UNTRAINED), "float32")
        recipe = learning.Recipe(steps=steps, batch=2, see_batch=2, say_batch=2, heads=4)
        made = training.Trainer(model, vlm, data, recipe, work)
        made.load_state()
        return made

    return make


def silent(text):
    pass


def take(trainer, lesson):
    getattr(trainer, lesson)(silent)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_changes_its_own_weights_alone(lesson, trainer):
    made = trainer("once", 2)
    before = {name: tensor.clone() for name, tensor in made.learned.items()}
    take(made, lesson)
    changed = {name for name, tensor in made.learned.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith(LESSONS[lesson]) for name in changed)
    assert made.progress[lesson].step == 2
    assert all(torch.equal(made.average[name], made.learned[name].detach()) for name in made.learned)


def test_what_was_cut_off_goes_on_as_if_it_had_not_been(trainer, training):
    whole = trainer("whole", 4)
    take(whole, "read")
    part = trainer("part", 4)

    class Stop(Exception):
        pass

    def stop(lesson, *rest, loss=part.denoising):
        if part.progress["read"].step == 2:
            part.save_state()
            raise Stop
        return loss(lesson, *rest)

    part.denoising = stop
    with pytest.raises(Stop):
        take(part, "read")
    again = trainer("part", 4)
    assert again.progress["read"].step == 2
    take(again, "read")
    for name, tensor in whole.learned.items():
        assert torch.equal(tensor, again.learned[name]), name


def test_a_finished_lesson_is_not_taken_again(trainer):
    made = trainer("once", 1)
    take(made, "say")
    before = {name: tensor.clone() for name, tensor in made.learned.items()}
    take(made, "say")
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.learned.items())


def test_what_was_learned_is_what_the_loaders_read(trainer, tmp_path):
    made = trainer("once", 1)
    for lesson in ("see", "draw"):
        take(made, lesson)
    made.write(tmp_path / "models")
    connector = multimodal_files.load_connector(str(tmp_path / "models" / learning.CONNECTOR))
    assert connector.info["see, steps"] == connector.info["draw, steps"] == 1
    assert connector.info["read, steps"] == 0
    again = load_vlm(tmp_path / "models" / learning.VLM, "auto").model.state_dict()
    for name, tensor in made.kept("vlm.").items():
        torch.testing.assert_close(again[name].float(), tensor, atol=2e-3, rtol=2e-3)


def test_another_training_begins_with_what_was_written(trainer, tmp_path):
    made = trainer("once", 1)
    for lesson in ("see", "draw"):
        take(made, lesson)
    made.write(tmp_path / "models")
    again = trainer("again", 1)
    again.begin_with(tmp_path / "models")
    known = [name for name in made.learned if not name.startswith("heads.")]
    for learned in (again.learned, again.average):
        for name in known:
            torch.testing.assert_close(learned[name].detach(), made.average[name], atol=2e-3, rtol=2e-3)
    assert all(p.requires_grad for p in again.learned.values())
    assert {name: progress.step for name, progress in again.progress.items()} == {
        "see": 1,
        "say": 0,
        "read": 0,
        "draw": 0,
    }


def test_a_picture_is_told_by_the_token_that_is_listened_to(training):
    told = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 30.0]])
    torch.testing.assert_close(training.listened(told), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    told[:, -1] = 0
    torch.testing.assert_close(training.listened(told), torch.tensor([0.5, 0.5]))
