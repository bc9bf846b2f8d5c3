"""The pocket's pose ControlNet: narrow, wide and as the host loads it, the same; its start changes nothing."""

import pytest
import torch
from pocket import checkpoint, train, world
from pose_control import openpose, pocket_control, skeleton, training

pytestmark = pytest.mark.usefixtures("inference")
B = 2


@pytest.fixture(autouse=True)
def host_is_there(monkeypatch):
    """It is imported by these tests' own way."""
    monkeypatch.setattr(train, "import_host", lambda: None)


@pytest.fixture(scope="module")
def called():
    """What a ControlNet of the pocket is called with."""
    drawn = torch.Generator().manual_seed(0)
    hint = skeleton.pictures(world.held_out_scenes(B)).movedim(-1, 1)
    return {
        "x": torch.randn(B, 4, 16, 16, generator=drawn), "timesteps": torch.tensor([900.0, 300.0]), "hint": hint,
        "context": torch.randn(B, 77, 768, generator=drawn),
    }  # fmt: skip


def test_a_skeleton_tells_pose_place_and_facing_and_nothing_else():
    (scene,) = world.held_out_scenes(1)
    shown = skeleton.draw(scene)
    for same in ({"colour": world.COLOURS[0]}, {"place": "night"}, {"collar": 0}, {"pattern": "spots"}):
        assert (skeleton.draw(world.edit(scene, **same)) == shown).all()
    others = ({"pose": p} for p in world.POSES if p != scene.pose)
    for other in (*others, {"facing": -scene.facing}, {"side": "left" if scene.side == "right" else "right"}):
        assert (skeleton.draw(world.edit(scene, **other)) != shown).any()


def test_it_lies_within_the_animal_but_for_joints_at_its_rim():
    for scene in world.held_out_scenes(8):
        if scene.species == "cat":  # others have shorter tails than their skeletons
            _, mask = world.render(scene, with_mask=True)
            assert (skeleton.draw(scene).any(-1) & (mask < 0.5)).mean() < 0.01


def test_a_training_starts_as_the_u_net(called):
    unet, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.UNET)
    control, network = pocket_control.begun(unet, 0), training.frozen(unet)
    x, t, context, hint = (called[name] for name in ("x", "timesteps", "context", "hint"))
    alone = network(x, t, context=context, transformer_options={})
    assert torch.equal(training.predict(network, control, x, t, context, hint, False), alone)
    learns = {name for name, p in control.named_parameters() if p.requires_grad}
    assert all(name.startswith(pocket_control.OWN) or "parametrizations" in name for name in learns)
    assert training.count() == sum(p.numel() for p in control.parameters() if p.requires_grad)


def test_packed_and_loaded_it_says_the_same(called, tmp_path):
    unet, _ = checkpoint.load_weights(checkpoint.WEIGHTS / checkpoint.UNET)
    control = pocket_control.begun(unet, 0)
    for parameter in control.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trained = {name: p for name, p in control.named_parameters() if p.requires_grad}
    pocket_control.save(tmp_path / "packed.safetensors", trained, {"steps": "7"})
    again = pocket_control.build()
    state, told = pocket_control.load(tmp_path / "packed.safetensors")
    again.load_state_dict(state)
    assert told == {"steps": "7"}
    assert apart(control(**called), again(**called)) < 0.02  # of 8 bits


def test_the_file_for_the_checkpoint_says_the_same_in_the_hosts_loader(called, tmp_path):
    import comfy.controlnet

    pocket_control.write_full(tmp_path / "full.safetensors")
    wide = comfy.controlnet.load_controlnet(str(tmp_path / "full.safetensors"), model_options={"dtype": torch.float32})
    narrow = pocket_control.narrow()
    said, widely = narrow.control_model(**called), wide.control_model(**called)
    assert len(widely["output"]) == 4
    twice = {name: [part.repeat_interleave(2, 1) for part in parts] for name, parts in said.items()}
    assert apart(twice, widely) < 0.01  # of float16


def test_what_ships_is_small():
    assert pocket_control.WEIGHTS.stat().st_size < 2_500_000


def test_a_person_is_drawn_with_every_limb():
    colours = {colour for _, colour in openpose.draw().getcolors(1 << 20)}
    assert len(colours) == 1 + len(openpose.LIMBS) + len(openpose.SITTING)
    assert openpose.FILE.is_file()


def apart(wanted: dict, found: dict) -> float:
    """Largest relative difference of the outputs."""
    pairs = [pair for name in wanted for pair in zip(wanted[name], found[name], strict=True)]
    return max(((a - b).norm() / a.norm()).item() for a, b in pairs)
