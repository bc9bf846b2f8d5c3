"""The checkpoint that stands for an InstructPix2Pix model in workflows: taught to edit, else the pocket's."""

from __future__ import annotations

from instruction import edit_checkpoint
from safetensors import safe_open

FIRST = f"{edit_checkpoint.PREFIX}input_blocks.0.0.weight"


def test_it_sees_the_picture_and_is_else_the_pocket_model(pocket_checkpoint, tmp_path):
    written = tmp_path / "edit.safetensors"
    edit_checkpoint.write(pocket_checkpoint, written)
    with safe_open(pocket_checkpoint, "pt") as pocket, safe_open(written, "pt") as edit:
        assert set(edit.keys()) == set(pocket.keys())
        shapes = [{name: file.get_slice(name).get_shape() for name in pocket.keys()} for file in (pocket, edit)]  # noqa: SIM118
        others = {name for name, shape in shapes[0].items() if shape != shapes[1][name]}
        assert others == {FIRST}
        weight = edit.get_tensor(FIRST)
        assert weight.shape == (320, 8, 3, 3)
        assert (weight[:, 4:].abs().amax((1, 2, 3)) > 0).all()  # each filter reads the picture
        for name in ("first_stage_model.vae_scale", "first_stage_model.vae_shift"):
            assert edit.get_tensor(name) == pocket.get_tensor(name)
    assert [path.name for path in tmp_path.iterdir()] == [written.name]
