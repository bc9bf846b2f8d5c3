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
