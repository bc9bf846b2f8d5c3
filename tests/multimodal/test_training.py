"""Train Multimodal Encoder in the host: what it learns, what it leaves alone, its files, going on, cancelling."""

import itertools
from dataclasses import replace

import comfy.model_management
import comfy.samplers
import comfy.sd
import folder_paths
import harness
import pytest
import tiny_models
import tiny_vlm
import torch
from palimpsest.kernels.connector import ConnectorConfig
from palimpsest.nodes import files as storage
from palimpsest.nodes.multimodal import dataset as interleaved_dataset
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.dataset import STAGES, ByMask, Recipe
from palimpsest.nodes.multimodal.encoder import Connector, MultimodalEncoder, Reads
from palimpsest.nodes.multimodal.training import drawing, encoding
from palimpsest.nodes.multimodal.training import files as training_files
from palimpsest.nodes.multimodal.training import fit as fitting
from palimpsest.nodes.multimodal.training import lessons as multimodal_lessons
from palimpsest.nodes.multimodal.training import nodes as training_nodes
from palimpsest.nodes.multimodal.training import training as multimodal_training
from palimpsest.nodes.multimodal.training.fit import Fit
from palimpsest.nodes.multimodal.training.learner import Learner, Process
from palimpsest.nodes.multimodal.training.lessons import Lessons
from palimpsest.nodes.multimodal.training.lora import unet_factors
from palimpsest.nodes.multimodal.training.nodes import TrainMultimodal
from palimpsest.nodes.multimodal.training.settings import TrainSettings
from palimpsest.nodes.multimodal.vlm import load_vlm, with_lora
from palimpsest.nodes.training import Watch, generator_at

import nodes

STEPS, TOKENS = 4, 4
SMALL = Recipe(min_side=4)
QUICK = {
    "tokens": TOKENS,
    "steps": STEPS,
    "batch_size": 2,
    "connector_rate": 3e-3,
    "depth": 1,
    "warmup": 0,
    "prompt_dropout": 0.0,
    "preview_every": 0,
    "save_every": 0,
    "lora_rank": 2,
}
NODE = {"language_rate": 1e-2, "unet_rate": 1e-2, "folder": "", "resume": "(new)"}


class VAE(tiny_models.AveragingVAE):
    """Stands for a VAE: colours averaged over 8 x 8 pixels, and back."""

    def decode(self, latent):
        picture = (latent[:, :3] + 4) / 8
        return torch.nn.functional.interpolate(picture, scale_factor=8).movedim(1, -1).clamp(0, 1)


pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Empty model folders."""
    (tmp_path / "loras").mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(
        folder_paths, "folder_names_and_paths", {"loras": ([str(tmp_path / "loras")], {".safetensors"})}
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(drawing, "SAMPLE_STEPS", 2)
    multimodal_files.SHELF.register()
    multimodal_files.ENCODERS.register()
    training_files.STATES.register()
    return tmp_path


@pytest.fixture(scope="module")
def vlms(tmp_path_factory):
    """Tiny vision-language models by kind, read once."""
    root, found = tmp_path_factory.mktemp("vlm"), {}

    def of(kind="idefics2"):
        if kind not in found:
            found[kind] = load_vlm(tiny_vlm.write(root / kind, kind), "float32")
        return found[kind]

    return of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return built(tmp_path_factory.mktemp("data") / "animals", 4)


def built(path, count, height=64, width=64, people=("man",), **recipe):
    """A dataset of smooth colours with a rectangle for a dog and one for a man."""
    path.mkdir(parents=True)
    pictures = list(tiny_models.picture(count, height, width))
    masks = torch.zeros(2, height, width)
    masks[0, 8:40, 8:40] = 1
    masks[1, 24:60, 30:60] = 1
    finder = ByMask([masks] * count, [("dog", "man")] * count)
    captions = ["a red dog and a man standing", "a dog with a man in the snow", "a man and his dog", "blue dog, man"]
    captions = [captions[i % 4] for i in range(count)]
    made, _ = interleaved_dataset.build_dataset(
        path, pictures, captions, finder, replace(SMALL, **recipe), ("sketch",), people=people
    )
    return made


def encoder_of(vlm, width=24, pooled=0):
    """An encoder with a small new connector."""
    config = ConnectorConfig(vlm.width, width, 1, 2, 2, pooled)
    return MultimodalEncoder(vlm, Connector.new(config, Reads.of(vlm, TOKENS)))


def train(vlm, dataset, family="sd15", model=None, encoder=None, **changes):
    """The node's outputs after a few steps."""
    chosen = {
        "model": tiny_models.unet(family) if model is None else model,
        "vae": VAE(),
        "dataset": dataset,
        "multimodal_encoder": encoder or MultimodalEncoder(vlm),
    }
    return tiny_models.execute(TrainMultimodal, **chosen | QUICK | NODE | changes)


def weights(connector):
    return torch.cat([tensor.flatten() for tensor in connector.weights().values()])


def picture(model, family="sd15"):
    """A picture sampled from seeded noise."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.prompt(1, family=family), tiny_models.prompt(2, family=family))
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=5
    )


def settings_of(**changes):
    return TrainSettings(**QUICK | changes)


def fit(vlm, dataset, family="sd15", prediction="EPS", model=None, **changes):
    """What `train` gives, without files."""
    model = tiny_models.unet(family, prediction) if model is None else model
    parts = {part: changes.pop(part, None) for part in ("state", "process", "watch")}
    return multimodal_training.train(model, VAE(), MultimodalEncoder(vlm), dataset, settings_of(**changes), **parts)


# ---- what it learns


@pytest.mark.parametrize(("family", "prediction"), [("sd15", "EPS"), ("sdxl", "EPS"), ("sd15", "V_PREDICTION")])
def test_one_picture_learned_by_heart_lowers_the_loss(vlms, dataset, family, prediction, monkeypatch):
    """On the same noise every time, so that the loss has nothing else to fall by."""

    def same(seed, what, *rest):
        return generator_at(seed, what, 0, rest[-1]) if what == "row" else generator_at(seed, what, *rest)

    monkeypatch.setattr(multimodal_lessons, "generator_at", same)
    one = replace(dataset, records=dataset.records[:1])
    model = tiny_models.unet(family, prediction)
    loud(model)
    trained = fit(vlms(), one, family, model=model, steps=30, connector_rate=1e-2)
    losses = trained.history.losses
    assert losses[-1] < 0.98 * losses[0]
    assert trained.history.recent() < min(losses[:3])


def loud(model):
    """A U-Net whose prediction depends on its prompt by much."""
    with torch.inference_mode():
        model.model.diffusion_model.out[2].weight.mul_(6)
        for name, parameter in model.model.diffusion_model.named_parameters():
            if ".attn2.to_" in name and parameter.ndim == 2:
                parameter.mul_(4)


@pytest.mark.parametrize("kind", ["idefics2", "smolvlm", *tiny_vlm.QWENS])
def test_all_three_parts_learn_and_the_files_say_the_same(vlms, dataset, folder, kind):
    model, vlm = tiny_models.unet(), vlms(kind)
    encoder, changed, samples, plot, report = train(vlm, dataset, model=model, train_unet=True, train_language=True)
    assert {path.name for path in folder.rglob("*.safetensors")} == {
        "connector_00001.safetensors", "connector_00001_unet.safetensors", "connector_00001_language.safetensors",
    }  # fmt: skip
    assert "4 steps" in report
    assert "models/loras/connector_00001_unet.safetensors" in report
    kept = multimodal_files.load_connector(str(folder / "palimpsest_connectors" / "connector_00001.safetensors"))
    assert torch.equal(weights(kept), weights(encoder.connector))
    assert kept.info["steps"] == STEPS
    loaded = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "connector_00001_unet.safetensors", 1.0)[0]
    assert len(loaded.patches) == len(unet_factors(model, 2, 0).pairs) == 56
    assert torch.equal(picture(loaded), picture(changed))
    assert not torch.equal(picture(changed), picture(model))
    file = comfy.utils.load_torch_file(str(folder / "loras" / "connector_00001_language.safetensors"))
    spoken = with_lora(vlm, file, 1.0, "it")
    prompts = [("a dog",)]
    plain, ours, theirs = (each.hidden_states(prompts).states.clone() for each in (vlm, encoder.vlm, spoken))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)
    assert samples.shape[0] == plot.shape[0] == 1
    assert samples.std() > 0.05


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_gradient_checkpointing_changes_no_bit_and_knows_its_blocks(vlms, dataset, family):
    """Patches by block see their own block while activations are made again."""
    seen = {}

    def note(kind):
        calls = seen.setdefault(kind, [])

        def patch(n, context, value, options):
            calls.append((options["block"], options["block_index"], n.shape[1]))
            return n * (1.0 + 0.1 * options["block"][1]), context, value

        return patch

    found = {}
    for wanted in (False, True):
        model = tiny_models.unet(family)
        model.set_model_attn1_patch(note(wanted))
        parts = {"train_unet": True, "train_language": True, "checkpointing": wanted}
        found[wanted] = fit(vlms(), dataset, family, model=model, steps=2, **parts).snapshot
    assert set(seen[True]) == set(seen[False])
    assert len(seen[True]) > len(seen[False])
    assert torch.equal(weights(found[True].connector), weights(found[False].connector))
    for part in ("unet_lora", "language_lora"):
        one, other = getattr(found[True], part), getattr(found[False], part)
        assert all(torch.equal(one[name], other[name]) for name in other)
        assert any(
            tensor.abs().max() > 0
            for name, tensor in other.items()
            if name.endswith(("lora_up.weight", "lora_B.weight"))
        )


@pytest.mark.parametrize(("prediction", "crop_weight"), [("EPS", 1.0), ("V_PREDICTION", 1.0), ("EPS", 5.0)])
def test_the_loss_is_the_published_one_by_hand(vlms, dataset, prediction, crop_weight, monkeypatch):
    """|eps_hat - eps|^2, or |v_hat - v|^2, of the host's network on the latent noised at a level of its schedule.

    crop_weight: how many times as much the dog's and the man's boxes count, in the mean over all places.
    """
    model, found = tiny_models.unet(prediction=prediction), {}
    boxes = torch.zeros(64, 64)
    boxes[8:40, 8:40] = boxes[24:60, 30:60] = 1
    counts = 1 + (crop_weight - 1) * boxes.view(8, 8, 8, 8).mean((1, 3))

    def losses(self, lesson):
        given = [generator.get_state() for generator in lesson.generators]
        ours = plain(self, lesson)
        for generator, state in zip(lesson.generators, given, strict=True):
            generator.set_state(state)
        clean = torch.stack([self.encoders.latent(r) for r in lesson.records])
        noise = torch.stack([torch.randn(c.shape, generator=g) for c, g in zip(clean, lesson.generators, strict=True)])
        place = ((1 - lesson.shares) * 1000).long()
        sigma = model.model.model_sampling.sigmas[place].clone()
        context, token_mask, _ = self.read(lesson.hidden, lesson.prompts)
        with torch.no_grad():
            for row in range(2):
                s, x = sigma[row], clean[row] + sigma[row] * noise[row]
                raw = model.model.diffusion_model(
                    (x / (s**2 + 1) ** 0.5)[None],
                    place[row : row + 1].float(),
                    context[row : row + 1, : int(token_mask[row].sum())],
                )[0]
                goal = noise[row] if prediction == "EPS" else (noise[row] - s * clean[row]) / (1 + s**2) ** 0.5
                error = (raw - goal).pow(2) * counts / counts.mean()
                found.setdefault("by hand", []).append(float(error.mean()))
        found["ours"] = found.get("ours", []) + ours.tolist()
        return ours

    plain = Fit.losses
    monkeypatch.setattr(Fit, "losses", losses)
    fit(vlms(), dataset, model=model, steps=2, crop_weight=crop_weight)
    assert found["ours"] == pytest.approx(found["by hand"], rel=1e-3)


def test_cells_of_crops_follow_the_picture_that_is_trained_on(dataset):
    """Boxes count once where they overlap; of a picture that is made smaller its middle is left."""

    def cells(*boxes, size, shape):
        crops = tuple(replace(dataset.records[0].crops[0], box=box) for box in boxes)
        return encoding.cells_of_crops(replace(dataset.records[0], size=size, crops=crops), *shape)

    found = cells((0, 0, 16, 8), (8, 0, 20, 8), size=(32, 16), shape=(4, 2))
    assert found.tolist() == [[[1.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]]
    found = cells((0, 0, 32, 64), size=(128, 64), shape=(4, 4))  # the middle begins at pixel 32
    assert not found.any()
    found = cells((32, 0, 64, 64), size=(128, 64), shape=(4, 4))
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 4, 4), atol=0.1, rtol=0.0)
    assert not cells(size=(32, 16), shape=(4, 2)).any()


def test_rows_of_other_lengths_are_predicted_as_each_by_itself(vlms, dataset, monkeypatch):
    """In one call with their filling left out; and one by one beside a node that replaces the cross-attention."""
    found = []

    def losses(self, lesson):
        ours = plain(self, lesson)
        found.append((self.unet.together, bool(lesson.hidden.mask.all()), ours.detach().clone()))
        return ours

    plain = Fit.losses
    monkeypatch.setattr(Fit, "losses", losses)
    fit(vlms(), dataset, steps=2)
    model = tiny_models.unet()

    def same(q, k, v, options):
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, options["n_heads"])

    for block in range(1, 4):
        model.set_model_attn2_replace(same, "input", block)
    fit(vlms(), dataset, model=model, steps=2)
    half = len(found) // 2
    assert [each[0] for each in found] == [True] * half + [False] * half
    assert not all(each[1] for each in found)
    for one, other in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(one[2], other[2], rtol=1e-4, atol=1e-5)


def test_sdxl_reads_the_pooled_vector_of_each_choice(vlms, dataset):
    given = []

    def watch(apply_model, arguments):
        given.append(arguments["c"]["y"].detach().clone())
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    class Clip:
        """Stands for a text encoder: the length of the text as its pooled output."""

        def tokenize(self, text):
            return text

        def encode_from_tokens(self, text, return_pooled):
            return None, torch.full((1, 1280), float(len(text)))

    def run(**changes):
        given.clear()
        model = tiny_models.unet("sdxl")
        model.set_model_unet_function_wrapper(watch)
        return train(vlms(), dataset, "sdxl", model, **changes)[0]

    run(steps=1)
    assert not given[0][:, :1280].any()
    assert given[0].shape == (2, 2816)
    assert given[0][:, 1280:].any()
    encoder = run(pooled_output="learned", steps=3)
    assert encoder.connector.config.pooled_width == 1280
    assert encoder.connector.weights()["pooled.weight"].abs().max() > 0
    run(steps=1, pooled_output="CLIP text", clip=Clip())
    assert given[0][0, 0] > 5
    with pytest.raises(ValueError, match="connect clip"):
        run(steps=1, pooled_output="CLIP text")


# ---- what it leaves alone


def test_the_model_the_encoder_and_the_language_model_stay_as_they_were(vlms, dataset):
    model, vlm = tiny_models.unet(), vlms()
    encoder = encoder_of(vlm)
    before, kept = picture(model), weights(encoder.connector).clone()
    hidden = vlm.hidden_states([("a dog",)]).states.clone()
    modes = [(module.training, len(module._forward_hooks)) for module in vlm.model.modules()]
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    train(vlm, dataset, model=model, encoder=encoder, train_unet=True, train_language=True)
    assert torch.equal(picture(model), before)
    assert torch.equal(weights(encoder.connector), kept)
    assert torch.equal(vlm.hidden_states([("a dog",)]).states, hidden)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.model.state_dict().items())
    assert [(module.training, len(module._forward_hooks)) for module in vlm.model.modules()] == modes


def test_training_begins_with_the_encoders_own_connector(vlms, dataset):
    encoder = encoder_of(vlms())
    trained = train(vlms(), dataset, encoder=encoder, steps=1, connector_rate=1e-7)[0]
    torch.testing.assert_close(weights(trained.connector), weights(encoder.connector), atol=1e-5, rtol=0)
    assert trained.connector.config == encoder.connector.config


def test_the_same_seed_gives_the_same_connector_and_previews_change_nothing(vlms, dataset):
    one, previewed, other = (
        weights(train(vlms(), dataset, seed=seed, preview_every=every)[0].connector)
        for seed, every in ((0, 0), (0, 2), (1, 0))
    )
    assert torch.equal(one, previewed)
    assert not torch.equal(one, other)


def test_the_guidance_of_other_nodes_does_not_act_while_it_learns(vlms, dataset):
    encoder, *_, report = train(vlms(), dataset, model=harness.guided(tiny_models.unet()))
    assert torch.equal(weights(encoder.connector), weights(train(vlms(), dataset)[0].connector))
    assert "left out (PerturbedAttentionGuidance)" in report


def test_half_precision_weights_train(vlms, dataset):
    model = tiny_models.unet(dtype=torch.bfloat16)
    encoder = train(vlms(), dataset, model=model, train_unet=True)[0]
    assert torch.isfinite(weights(encoder.connector)).all()


# ---- going on, several processes


def test_a_training_that_goes_on_is_one_that_never_stopped(vlms, dataset, monkeypatch):
    monkeypatch.setattr(fitting, "READ_AHEAD", 3)
    both = {"train_unet": True, "train_language": True, "warmup": 3, "prompt_dropout": 0.3}
    whole = fit(vlms(), dataset, steps=5, **both)
    first = fit(vlms(), dataset, steps=2, **both)
    second = fit(vlms(), dataset, steps=3, state=first.snapshot.state, **both)
    assert second.history.steps == 5
    assert second.history.losses == whole.history.losses[2:]
    assert second.snapshot.state.keys() == whole.snapshot.state.keys()
    for name, tensor in whole.snapshot.state.items():
        assert torch.equal(tensor, second.snapshot.state[name]), name


def test_the_node_goes_on_from_its_file(vlms, dataset, folder):
    first = train(vlms(), dataset)[0]
    name = "connector_00001.safetensors"
    assert training_files.trainings() == ["(new)", name]
    second = train(vlms(), dataset, resume=name)[0]
    assert second.connector.info["steps"] == 2 * STEPS
    assert not torch.equal(weights(first.connector), weights(second.connector))
    with pytest.raises(ValueError, match="is another one"):
        train(vlms(), dataset, resume=name, train_unet=True)
    with pytest.raises(ValueError, match="is another one"):
        train(vlms(), dataset, resume=name, depth=2)


def test_a_state_without_moments_holds_what_learns_alone_and_warms_up_anew(vlms, dataset, monkeypatch):
    both = {"train_unet": True, "train_language": True, "warmup": 3, "keep_moments": False}
    first, rates, begin = fit(vlms(), dataset, steps=4, **both), [], Learner.begin

    def noted(self, step, end):
        begin(self, step, end)
        rates.append([group["lr"] for _, optimiser, _ in self.optimisers for group in optimiser.param_groups])

    whole = fit(vlms(), dataset, steps=4, **both | {"keep_moments": True}).snapshot.state
    assert first.snapshot.state.keys() == {name for name in whole if "|" not in name}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in first.snapshot.state.items())
    monkeypatch.setattr(Learner, "begin", noted)
    second = fit(vlms(), dataset, steps=4, state=first.snapshot.state, **both)
    assert second.history.steps == 8
    assert torch.tensor(rates).T.tolist() == [
        pytest.approx([rate / 3, 2 * rate / 3, rate, rate]) for rate in second.snapshot.info["rates"]
    ]


def test_a_stop_in_a_warm_up_that_began_anew_is_not_felt(vlms, dataset):
    both = {"train_unet": True, "warmup": 3}
    begun = fit(vlms(), dataset, steps=2, **both, keep_moments=False).snapshot.state
    whole = fit(vlms(), dataset, steps=4, state=begun, **both).snapshot.state
    first = fit(vlms(), dataset, steps=1, state=begun, **both).snapshot.state
    second = fit(vlms(), dataset, steps=3, state=first, **both).snapshot.state
    assert int(whole["anew"]) == 2 and whole.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in whole.items())


def test_a_training_goes_on_with_another_dataset(vlms, dataset, tmp_path):
    """As large sets are trained on, that were built in parts."""
    other = built(tmp_path / "others", 3, height=48)
    first = fit(vlms(), dataset, steps=2)
    second = fit(vlms(), other, steps=2, state=first.snapshot.state)
    assert second.history.steps == 4
    assert second.snapshot.info["dataset"] == "others"


def test_processes_share_a_batch_row_by_row(dataset):
    alone = Lessons(dataset, settings_of(batch_size=4), TOKENS, dict.fromkeys(range(4), (8, 8)))
    parts = [Lessons(dataset, settings_of(), TOKENS, dict.fromkeys(range(4), (8, 8)), rank, 2) for rank in (0, 1)]
    for step in range(3):
        (whole,), halves = alone.of_step(step), [next(each.of_step(step)) for each in parts]
        assert whole.records == halves[0].records + halves[1].records
        assert torch.equal(whole.shares, torch.cat([half.shares for half in halves]))
        texts = [[[p for p in prompt if isinstance(p, str)] for prompt in each.prompts] for each in (whole, *halves)]
        assert texts[0] == texts[1] + texts[2]


def test_accumulated_steps_are_those_of_the_larger_batch(vlms, dataset):
    large, small = (
        fit(vlms(), dataset, **each) for each in ({"batch_size": 4}, {"batch_size": 2, "gradient_accumulation": 2})
    )
    torch.testing.assert_close(
        weights(large.snapshot.connector), weights(small.snapshot.connector), rtol=1e-3, atol=1e-4
    )


def test_batches_hold_pictures_of_one_size_and_every_picture_comes_once(dataset):
    sizes = {0: (8, 8), 1: (8, 8), 2: (8, 8), 3: (8, 8), 4: (8, 6), 5: (8, 6)}
    lessons = Lessons(dataset, settings_of(), TOKENS, sizes)
    for epoch in range(3):
        batches = lessons.epoch(epoch)
        assert len(batches) == lessons.per_epoch == 3
        assert sorted(itertools.chain(*batches)) == list(sizes)
        assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)


# ---- the node


CHOSEN = {
    "stage": list(STAGES)[1],
    "steps": 11,
    "batch_size": 12,
    "connector_rate": 0.013,
    "train_unet": True,
    "train_language": True,
    "pooled_output": "learned",
    "seed": 14,
    "tokens": 25,
    "gradient_accumulation": 16,
    "language_rate": 0.017,
    "unet_rate": 0.018,
    "lora_rank": 19,
    "depth": 20,
    "prompt_dropout": 0.21,
    "warmup": 22,
    "checkpointing": False,
    "preview_every": 23,
    "save_every": 24,
    "align_steps": 26,
    "read_steps": 27,
    "align_rate": 0.028,
    "read_rate": 0.029,
    "picture_dropout": 0.31,
    "keep_moments": False,
    "weighting": "SNR + 1",
    "schedule": "linear",
    "crop_weight": 3.5,
}


def test_every_input_arrives_in_its_field(monkeypatch):
    """All values unlike one another, and unlike the defaults."""
    given = {}

    def note(*sockets, **more):
        given.update(more, sockets=sockets)
        raise InterruptedError

    monkeypatch.setattr(training_nodes, "train", note)
    others = {"vae": "a vae", "multimodal_encoder": "an encoder", "dataset": "a dataset", "clip": "a clip"}
    files = {"folder": "", "resume": "(new)", "name": "a name", "keep_state": False}
    with pytest.raises(InterruptedError):
        TrainMultimodal.execute(model=tiny_models.unet(), **others, **files, **CHOSEN)
    assert given["sockets"][1:4] == ("a vae", "an encoder", "a dataset")
    assert (given["clip"], given["state"]) == ("a clip", None)
    assert given["sockets"][4].named() == CHOSEN
    assert all(value != getattr(TrainSettings(), name) for name, value in CHOSEN.items())
    assert {entry.id for entry in TrainMultimodal.define_schema().inputs} == {
        *CHOSEN, *others, *files, "model", "preset",
    }  # fmt: skip


# ---- cancelling, NaN, what is refused


def test_cancelling_keeps_what_was_learned(vlms, dataset, folder, monkeypatch):
    step, kept = Fit.step, {}

    def stop(self, number, lessons):
        if number == 3:
            kept["weights"] = torch.cat(
                [p.detach().flatten().clone() for p in self.learner.network.state_dict().values()]
            )
            raise comfy.model_management.InterruptProcessingException
        step(self, number, lessons)

    monkeypatch.setattr(Fit, "step", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(vlms(), dataset, steps=6)
    found = multimodal_files.load_connector(str(folder / "palimpsest_connectors" / "connector_00001.safetensors"))
    assert found.info["steps"] == 3
    assert torch.equal(weights(found), kept["weights"])
    state = training_files.load_state(str(folder / "palimpsest_trainings" / "connector_00001.safetensors"))
    assert int(state["steps"]) == 3


def test_a_gradient_that_is_no_number_changes_nothing_and_stops_the_training(vlms, dataset, monkeypatch):
    losses, calls = Fit.losses, []

    def broken(self, lesson):
        calls.append(1)
        found = losses(self, lesson)
        return found * float("nan") if len(calls) > 2 else found

    good = fit(vlms(), dataset, steps=2)
    monkeypatch.setattr(Fit, "losses", broken)
    trained = fit(vlms(), dataset, steps=20)
    assert "no number" in multimodal_training.describe(trained)
    assert len(trained.history.losses) == 5
    assert torch.equal(weights(trained.snapshot.connector), weights(good.snapshot.connector))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_model_that_returns_nan_from_the_start_is_told_whatever_the_steps(vlms, dataset, folder, monkeypatch, steps):
    losses = Fit.losses
    monkeypatch.setattr(Fit, "losses", lambda self, lesson: losses(self, lesson) * float("nan"))
    with pytest.raises(ValueError, match=r"returns NaN for these pictures.*the pictures of the dataset"):
        train(vlms(), dataset, steps=steps)
    assert list(folder.rglob("*.safetensors")) == []


def test_the_first_two_steps_may_fail_where_later_ones_do_not(vlms, dataset, monkeypatch):
    losses, calls = Fit.losses, []

    def broken(self, lesson):
        calls.append(1)
        return losses(self, lesson) * (float("nan") if len(calls) <= 2 else 1.0)

    monkeypatch.setattr(Fit, "losses", broken)
    trained = fit(vlms(), dataset)
    assert "4 steps" in multimodal_training.describe(trained)
    assert trained.history.stopped == ""
    assert trained.history.recent() > 0
    assert torch.isfinite(weights(trained.snapshot.connector)).all()


def test_saving_now_and_then_writes_one_set_of_files(vlms, dataset, folder):
    train(vlms(), dataset, save_every=1)
    assert len(list(folder.rglob("*.safetensors"))) == 2
    train(vlms(), dataset, keep_state=False)
    written = sorted(path.name for path in (folder / "palimpsest_connectors").glob("*.safetensors"))
    assert written == ["connector_00001.safetensors", "connector_00002.safetensors"]


def test_no_step_is_taken_for_what_cannot_be_written(vlms, dataset, folder, monkeypatch):
    steps = []
    monkeypatch.setattr(Fit, "step", lambda self, number, lessons: steps.append(number))
    (folder / "palimpsest_trainings").rename(folder / "away")
    (folder / "palimpsest_trainings").touch()
    with pytest.raises(OSError, match=r"connector_00001.safetensors cannot be written \(Not a directory\)"):
        train(vlms(), dataset)
    assert "Not a directory" in TrainMultimodal.validate_inputs("connector", True)
    assert TrainMultimodal.validate_inputs("connector", False) is True
    (folder / "palimpsest_trainings").unlink()
    (folder / "loras").rmdir()
    (folder / "loras").touch()
    with pytest.raises(OSError, match=r"connector_00001_unet.safetensors cannot be written \(Not a directory\)"):
        train(vlms(), dataset, train_unet=True)
    training_files.TrainingFiles.new("connector", True)  # which would write no LoRA
    (folder / "loras").unlink()
    usage = storage.shutil.disk_usage(".")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match="the disk has 1 MB free: make room, or train without keep_state"):
        train(vlms(), dataset, train_unet=True)
    assert steps == [] and list(folder.rglob("*.safetensors")) == []


@pytest.mark.parametrize("keep_moments", [True, False])
def test_the_room_that_is_asked_for_is_that_of_the_files(vlms, dataset, folder, monkeypatch, keep_moments):
    asked = {}
    monkeypatch.setattr(training_files.TrainingFiles, "require_room", lambda self, sizes, again: asked.update(sizes))
    train(vlms(), dataset, train_unet=True, train_language=True, keep_state=True, keep_moments=keep_moments)
    places = {"connector": "palimpsest_connectors/connector_00001", "state": "palimpsest_trainings/connector_00001"}
    places |= {part: f"loras/connector_00001_{part}" for part in ("unet", "language")}
    assert asked.keys() == places.keys()
    for part, place in places.items():
        content = (folder / f"{place}.safetensors").read_bytes()
        size = len(content) - 8 - int.from_bytes(content[:8], "little")  # without its header, which grows with names
        assert asked[part] <= size < asked[part] + 10_000, part


def test_a_disk_that_is_full_for_a_while_costs_nothing(vlms, dataset, folder, monkeypatch):
    write, told = storage.Shelf.write, []

    def full(self, path, *rest, **more):
        if len(told) < 2:
            raise OSError(28, "No space left on device")
        write(self, path, *rest, **more)

    monkeypatch.setattr(storage.Shelf, "write", full)
    watch = Watch(tell=told.append, save=training_files.TrainingFiles.new("mine", True).save)
    trained = fit(vlms(), dataset, steps=4, save_every=1, watch=watch)
    assert "No space left on device. Kept: nothing." in told[1]
    assert told[-1].endswith(f"loss {trained.history.recent():.4f}")
    assert len(list(folder.rglob("mine_00001.safetensors"))) == 2


def test_where_not_all_can_be_saved_the_state_is_and_it_is_said(vlms, dataset, folder, monkeypatch):
    write = storage.Shelf.write

    def full(self, path, *rest, **more):
        if self.folder != training_files.STATES.folder:
            raise OSError(28, "No space left on device")
        write(self, path, *rest, **more)

    monkeypatch.setattr(storage.Shelf, "write", full)
    with pytest.raises(OSError, match=r"not all .* Kept: models/palimpsest_trainings/connector_00001.safetensors\."):
        train(vlms(), dataset, keep_state=True)
    monkeypatch.setattr(storage.Shelf, "write", write)
    train(vlms(), dataset, keep_state=True, resume="connector_00001.safetensors")
    found = multimodal_files.load_connector(str(folder / "palimpsest_connectors" / "connector_00002.safetensors"))
    assert found.info["steps"] == 2 * STEPS


def test_an_earlier_state_and_lora_are_never_written_over(vlms, dataset, folder):
    earlier = [folder / f"{name}.safetensors" for name in ("palimpsest_trainings/mine_00001", "loras/mine_00002_unet")]
    for path in earlier:
        path.write_bytes(b"EARLIER")
    report = train(vlms(), dataset, name="mine", keep_state=True, train_unet=True)[4]
    assert report.count("mine_00003") == 3
    assert [path.read_bytes() for path in earlier] == [b"EARLIER"] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "324 are wanted"),
        ({"tokens": 5}, "square number"),
        ({"folder": "nothing here", "dataset": None}, "no dataset 'nothing here'"),
        ({"name": "///"}, "no letters or digits"),
    ],
)
def test_what_cannot_be_trained_is_said(vlms, dataset, changes, words):
    with pytest.raises(ValueError, match=words):
        train(vlms(), changes.pop("dataset", dataset), **changes)


def test_a_connector_for_another_model_and_a_dataset_without_people_are_refused(vlms, dataset, tmp_path):
    with pytest.raises(ValueError, match="makes tokens of 32 channels, this model reads 24"):
        train(vlms(), dataset, encoder=encoder_of(vlms(), width=32))
    with pytest.raises(ValueError, match="no pooled output to learn"):
        train(vlms(), dataset, "sdxl", encoder=encoder_of(vlms()), pooled_output="learned")
    nobody = built(tmp_path / "nobody", 2, people=())
    with pytest.raises(ValueError, match="no crop of a person"):
        train(vlms(), nobody, stage=list(STAGES)[1])


def test_stage_two_shows_one_person_in_a_prompt(dataset):
    stage = STAGES[list(STAGES)[1]]
    for number in range(8):
        prompt = dataset.draw(number % 4, stage, TOKENS, generator_at(number))
        pictures = [part for part in prompt if not isinstance(part, str)]
        assert [each.name for each in pictures] == ["man"]


def test_an_only_process_changes_nothing_about_its_tensors():
    tensor = torch.ones(2)
    Process().average([tensor])
    assert torch.equal(tensor, torch.ones(2))
