"""What tests of multimodal prompts share: model folders where the host looks for them, loaded models, connectors."""

import pytest


@pytest.fixture(scope="module")
def encoder_folders(tmp_path_factory):
    """Folders of every family, of connectors and of LoRAs, where the host looks for them."""
    import folder_paths
    import tiny_vlm

    root = tmp_path_factory.mktemp("encoders")
    with pytest.MonkeyPatch.context() as patch:
        known = dict(folder_paths.folder_names_and_paths)
        for name, folder in (
            ("palimpsest_encoders", "models"),
            ("palimpsest_connectors", "connectors"),
            ("loras", "loras"),
        ):
            known[name] = ([str(root / folder)], {".safetensors"})
            (root / folder).mkdir()
        patch.setattr(folder_paths, "folder_names_and_paths", known)
        patch.setattr(folder_paths, "filename_list_cache", {})
        for kind in tiny_vlm.KINDS:
            tiny_vlm.write(root / "models" / kind, kind)
        yield root


@pytest.fixture(scope="module")
def loaded(encoder_folders):
    """A loaded model by (kind, perceiver), read when first asked for."""
    from palimpsest.nodes.multimodal.vlm import load_vlm

    read = {}

    def get(kind="idefics2", perceiver=False):
        if (kind, perceiver) not in read:
            read[kind, perceiver] = load_vlm(encoder_folders / "models" / kind, "float32", perceiver)
        return read[kind, perceiver]

    return get


@pytest.fixture(scope="module")
def data():
    """Four drawn scenes of the benchmark's trainings, with random latents."""
    import torch
    from benchmarks import multimodal_pocket as learning
    from pocket import world

    scenes = world.held_out_scenes(4)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return learning.Data(scenes, *learning.painted(scenes), latents)


@pytest.fixture
def model(monkeypatch):
    """A small random SD 1.5 whose prompts are as wide as the text encoder's; its weights can be trained through."""
    import comfy.model_patcher
    import tiny_models
    import torch

    family = (*tiny_models.FAMILIES["sd15"][:2], tiny_models.SD15 | {"context_dim": 768})
    monkeypatch.setitem(tiny_models.FAMILIES, "sd15-wide", family)
    torch.manual_seed(0)
    base = tiny_models.network("sd15-wide")
    with torch.no_grad():
        tiny_models.fill(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=tiny_models.CPU, offload_device=tiny_models.CPU)
