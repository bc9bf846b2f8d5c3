"""Draw the pictures of the help pages of flow-matching inversion: the pocket model, seen as a flow-matching one.

python dev.py draw inversion
"""

from __future__ import annotations

import torch
from graphs.titles import thumbnail_of
from inversion.graph import TITLE
from inversion.pocket_flow import as_flow
from make_pictures import ROOT, Studio, example_scene, panels, save, thumbnail
from PIL import Image
from pocket import world

STEPS, GUIDANCE, SEED = 20, 3.0, 3
EDIT = {"source_guidance": 1.0, "start_percent": 0.2}
SIDE = 384


class FlowStudio:
    """The nodes on the pocket model as a flow, at their defaults except what is given."""

    def __init__(self) -> None:
        import comfy.samplers
        from comfy_extras import nodes_custom_sampler

        self.studio, self.samplers, self.nodes = Studio(), comfy.samplers, nodes_custom_sampler
        self.model = as_flow(self.studio.model)
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)

    def picture(self, latent: torch.Tensor) -> Image.Image:
        pixels = self.studio.vae.decode(latent)[0].clamp(0, 1)
        return Image.fromarray((pixels * 255).round().byte().numpy())

    def encoded(self, scene: world.Scene) -> torch.Tensor:
        return self.studio.vae.encode(torch.from_numpy(world.render(scene)).float()[None] / 255)

    def sample(self, noise, sampler, latent: torch.Tensor, prompt: str, cfg: float) -> Image.Image:
        """What SamplerCustomAdvanced draws."""
        guider = self.samplers.CFGGuider(self.model)
        guider.set_conds(self.studio.prompt(prompt), self.studio.nothing)
        guider.set_cfg(cfg)
        run = self.nodes.SamplerCustomAdvanced.execute(noise, guider, sampler, self.sigmas, {"samples": latent})
        return self.picture(run.args[0]["samples"])

    def invert(self, scene: world.Scene, method: str) -> tuple:
        """(rebuilt picture, inverted noise)"""
        node, prompt = self.studio.invert_node, self.studio.prompt(world.caption(scene))
        chosen = self.studio.defaults(node) | {"steps": STEPS, "scheduler": "simple", "flow_method": method}
        chosen["reconstruction_guidance"] = 1.0
        given = {"latent": {"samples": self.encoded(scene)}, "positive": prompt, "vae": self.studio.vae}
        _, _, rebuilt, report, noise = node.execute(model=self.model, **given, **chosen).args
        print(method, report)
        return self.picture(rebuilt["samples"]), noise

    def flow_edit(
        self, scene: world.Scene, change: dict, *, cfg: float = GUIDANCE, mask=None, **settings
    ) -> Image.Image:
        """The picture of a scene, edited by FlowEdit Sampler."""
        from palimpsest.nodes.inversion.flow_nodes import FlowEdit

        chosen = self.studio.defaults(FlowEdit) | EDIT | settings
        prompts = self.studio.prompt(world.caption(scene)), self.studio.nothing
        (sampler,) = FlowEdit.execute(*prompts, mask, **chosen).args
        target = world.caption(world.edit(scene, **change))
        return self.sample(self.nodes.Noise_RandomNoise(SEED), sampler, self.encoded(scene), target, GUIDANCE)


def main() -> None:
    """Write web/docs/Palimpsest{Invert,FlowEdit,FlowSampler}/*.jpg and the workflow's thumbnail."""
    with torch.inference_mode():
        studio, scene = FlowStudio(), example_scene()
        source, mask = Image.fromarray(world.render(scene)), studio.studio.animal(scene, 2)
        blue, sitting = {"colour": "blue"}, {"pose": "sitting"}
        edited = studio.flow_edit(scene, blue, mask=mask)
        cells = [
            (source, "your picture"),
            (studio.flow_edit(scene, blue), "blue, no mask"),
            (edited, "blue, mask on the cat"),
            (studio.flow_edit(scene, sitting), "sitting, no mask"),
        ]
        docs = ROOT / "web" / "docs"
        print(save(panels(cells), docs / "PalimpsestFlowEdit" / "flow_edit.jpg"))
        starts = (0.0, 0.2, 0.4, 0.6)
        cells = [(studio.flow_edit(scene, blue, start_percent=start), f"start_percent {start:g}") for start in starts]
        print(save(panels(cells), docs / "PalimpsestFlowEdit" / "start.jpg"))
        small = thumbnail(edited, source).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        print(save(small, thumbnail_of(TITLE)))
        cells = [(source, "your picture")]
        cells += [
            (studio.invert(scene, method)[0], f"{method}, {STEPS} steps") for method in ("Euler", "Uni-Inv", "FireFlow")
        ]
        print(save(panels(cells), docs / "PalimpsestFlowSampler" / "ways.jpg"))
