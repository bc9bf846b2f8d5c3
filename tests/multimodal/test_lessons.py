"""The lessons of Train Multimodal Encoder before the last: what tokens stand for, what each changes, going on."""

import itertools

import comfy.model_management
import comfy.sd1_clip
import folder_paths
import pytest
import tiny_models
import tiny_vlm
import torch
from palimpsest.kernels.lora import COSINE
from palimpsest.nodes.multimodal import dataset as interleaved_dataset
from palimpsest.nodes.multimodal import files as multimodal_files
from palimpsest.nodes.multimodal.dataset import ByMask, Recipe
from palimpsest.nodes.multimodal.encoder import MultimodalEncoder
from palimpsest.nodes.multimodal.interleaved import Picture
from palimpsest.nodes.multimodal.training import drawing, encoding, plot, saying
from palimpsest.nodes.multimodal.training import files as training_files
from palimpsest.nodes.multimodal.training import fit as fitting
from palimpsest.nodes.multimodal.training import training as multimodal_training
from palimpsest.nodes.multimodal.training.course import ALIGN, DRAW, READ, Course
from palimpsest.nodes.multimodal.training.fit import Fit
from palimpsest.nodes.multimodal.training.learner import Learner
from palimpsest.nodes.multimodal.training.lessons import Lessons, in_words
from palimpsest.nodes.multimodal.training.nodes import TrainMultimodal
from palimpsest.nodes.multimodal.training.saying import Speaker
from palimpsest.nodes.multimodal.training.settings import AS_TRAINED, SNR_PLUS_1, TrainSettings
from palimpsest.nodes.multimodal.vlm import load_vlm
from palimpsest.nodes.training import Watch

TOKENS = 4
QUICK = {
    "tokens": TOKENS, "steps": 2, "batch_size": 2, "connector_rate": 3e-3, "unet_rate": 1e-2, "depth": 1, "warmup": 0,
    "prompt_dropout": 0.0, "preview_every": 0, "save_every": 0, "lora_rank": 2, "align_rate": 3e-3, "read_rate": 1e-2,
    "train_unet": True,
}  # fmt: skip
LESSONS = {"align_steps": 3, "read_steps": 2}

pytestmark = pytest.mark.usefixtures("inference")


class Clip:
    """The host's tokenizer of CLIP, and vectors of 24 channels from a seed in the place of its encoder."""

    def __init__(self, width=24):
        self.tokenizer, self.width = comfy.sd1_clip.SD1Tokenizer(), width

    def tokenize(self, text, return_word_ids=False):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens(self, tokens, return_pooled=False):
        rows = [torch.randn(self.width, generator=torch.Generator().manual_seed(t)) for t, _ in tokens["l"][0]]
        return torch.stack(rows)[None], torch.full((1, 1280), float(tokens["l"][0][1][0]))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Empty model folders."""
    (tmp_path / "loras").mkdir()
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    loras = {"loras": ([str(tmp_path / "loras")], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", loras)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(drawing, "SAMPLE_STEPS", 2)
    for shelf in (multimodal_files.SHELF, multimodal_files.ENCODERS, training_files.STATES):
        shelf.register()
    return tmp_path


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load_vlm(tiny_vlm.write(tmp_path_factory.mktemp("vlm") / "idefics2"), "float32")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "animals"
    path.mkdir()
    mask = torch.zeros(1, 64, 64)
    mask[0, 8:40, 8:40] = 1
    captions = [
        "a red dog standing in the snow",
        "a black cat in the park",
        "the blue dog sitting",
        "a white cat, sand",
    ]
    words = [("red dog",), ("black cat",), ("blue dog",), ("white cat",)]
    finder = ByMask([mask] * 4, words)
    pictures = list(tiny_models.picture(4))
    return interleaved_dataset.build_dataset(path, pictures, captions, finder, Recipe(min_side=4), ("sketch",))[0]


def fit(vlm, dataset, family="sd15", model=None, **changes):
    """What a training gives, without files."""
    parts = {part: changes.pop(part, None) for part in ("state", "watch")}
    clip = changes.pop("clip", Clip())
    model = tiny_models.unet(family) if model is None else model
    settings = TrainSettings(**QUICK | changes)
    return multimodal_training.train(
        model, tiny_models_vae(), MultimodalEncoder(vlm), dataset, settings, clip=clip, **parts
    )


def tiny_models_vae():
    """A VAE that also decodes."""

    class VAE(tiny_models.AveragingVAE):
        def decode(self, latent):
            picture = (latent[:, :3] + 4) / 8
            return torch.nn.functional.interpolate(picture, scale_factor=8).movedim(1, -1).clamp(0, 1)

    return VAE()


def part_of(state, part):
    """What is learned of a part, without its optimiser."""
    return torch.cat([t.flatten() for name, t in state.items() if name.startswith(f"{part}.") and "|" not in name])


# ---- the course


def test_steps_of_lessons_come_one_after_the_other_and_no_part_holds_two():
    course = Course(3, 2)
    assert [course.lesson(step) for step in range(7)] == [ALIGN] * 3 + [READ] * 2 + [DRAW] * 2
    assert [course.begin(step) for step in range(7)] == [0, 0, 0, 3, 3, 5, 5]
    assert list(course.parts(0, 9, 2)) == [range(0, 2), range(2, 3), range(3, 5), range(5, 7), range(7, 9)]
    assert list(Course().parts(2, 9, 4)) == [range(2, 6), range(6, 9)]
    assert [course.end(before, 4) for before in (0, 4, 5, 7)] == [9, 9, 9, 11]
    assert Course().end(7, 4) == 11
    assert [course.behind(step, 9) for step in range(7)] == [3, 3, 3, 5, 5, 9, 9]


# ---- what tokens stand for


def test_every_token_has_its_word_and_a_picture_the_words_it_is_bound_to(vlm):
    pixels = torch.rand(8, 8, 3)
    prompt = ("a ", Picture(pixels, TOKENS, 1.0, "red dog"), " red dog, sitting")
    tokens = saying.words_of_tokens(vlm, prompt, prompt, vlm.tokenised(prompt)[1])
    words = ["a", "red", "dog,", "sitting"]
    assert saying.words_of(prompt) == words
    read = [None if each is None else " ".join(words[i] for i in each) for each in tokens]
    half = (TOKENS + 2) // 2
    assert read == [None, "a", *["red"] * half, *["dog,"] * half, "red", "dog,", "dog,", "sitting"]
    whole = ("", Picture(pixels, TOKENS, 1.0, "sketch"), " ", *prompt)
    assert saying.bound_words(whole, 1) == range(4)


@pytest.mark.parametrize(
    ("words", "tokens", "wanted"),
    [
        (range(3, 5), 5, [[3], [3], [3], [4], [4]]),
        (range(3), 3, [[0], [1], [2]]),
        (range(5), 2, [[0, 1], [2, 3, 4]]),
        (range(4), 1, [[0, 1, 2, 3]]),
        (range(0), 2, [[], []]),
    ],
)
def test_words_are_shared_out_over_tokens_in_order(words, tokens, wanted):
    assert [list(each) for each in saying.shared_out(words, tokens)] == wanted


def test_what_is_said_of_words_are_their_pieces_and_pictures_count_together(vlm):
    clip, pixels = Clip(), torch.rand(8, 8, 3)
    prompt = ("a ", Picture(pixels, TOKENS, 1.0, "dog"), " dog standing")
    said = Speaker(tiny_models.unet(), clip).say(vlm, prompt, prompt)
    states = clip.encode_from_tokens(clip.tokenize("a dog standing"))[0][0]
    wanted = said.wanted()
    torch.testing.assert_close(wanted[:2], states[:2])
    torch.testing.assert_close(wanted[2 : 4 + TOKENS], states[2].expand(2 + TOKENS, -1))
    torch.testing.assert_close(wanted[-1], states[3])
    assert float(said.weight[2 : 4 + TOKENS].sum()) == pytest.approx(saying.PICTURE)
    assert said.weight[:2].tolist() == [1, 1]


def test_a_word_of_several_pieces_is_their_mean_and_an_empty_prompt_what_stands_behind_the_start(vlm):
    clip = Clip()
    speaker = Speaker(tiny_models.unet(), clip)
    ids = [t for t, _, word in clip.tokenize(r"\(zyxwvut\)", return_word_ids=True)["l"][0] if word]
    states, rows = speaker.of(["a", "(zyxwvut)", "dog"])
    assert rows == [[1], [2 + i for i in range(len(ids))], [2 + len(ids)]]
    states = clip.encode_from_tokens(clip.tokenize(""))[0][0]
    torch.testing.assert_close(speaker.say(vlm, (), ()).wanted(), states[1:].mean(0, keepdim=True))


def test_texts_are_kept_as_far_as_their_bytes_go(monkeypatch):
    states, _ = Speaker(tiny_models.unet(), Clip()).of(["a", "dog"])
    for bytes_, kept in ((2 * states.nbytes, ["a dog", "a cat"]), (3 * states.nbytes, ["a dog", "a cat", "a cow"])):
        monkeypatch.setattr(saying, "MOST_KNOWN", bytes_)
        speaker = Speaker(tiny_models.unet(), Clip())
        for text in ("a cow", "a dog", "a cat"):
            speaker.of(text.split())
        assert sorted(speaker.known) == sorted(kept)  # the first are forgotten
    monkeypatch.setattr(saying, "MOST_KNOWN", 1)
    assert torch.equal(speaker.of(["a", "fox"])[0], speaker.of(["a", "fox"])[0])
    assert list(speaker.known) == ["a fox"]


def test_words_that_are_left_out_are_said_by_the_picture_alone(vlm):
    clip, pixels = Clip(), torch.rand(8, 8, 3)
    whole = ("a ", Picture(pixels, TOKENS, 1.0, "red spotted dog"), " red spotted dog and a man")
    shown = {saying.leaving_out(whole, torch.Generator().manual_seed(seed)) for seed in range(40)}
    assert {prompt[2].strip() for prompt in shown} == {
        "red spotted dog and a man", "spotted dog and a man", "dog and a man", "and a man",
    }  # fmt: skip
    states = clip.encode_from_tokens(clip.tokenize("a red spotted dog and a man"))[0][0]
    for prompt in shown:
        wanted = Speaker(tiny_models.unet(), clip).say(vlm, prompt, whole).wanted()
        torch.testing.assert_close(wanted[2 : 4 + TOKENS], states[2:5].repeat_interleave((2 + TOKENS) // 3, 0))
        torch.testing.assert_close(wanted[-1], states[7])
    sketch = (Picture(pixels, TOKENS, 1.0, "sketch"), " a dog")
    assert saying.leaving_out(sketch, torch.Generator()) == sketch


def pictures_in(prompts):
    """How many of some prompts hold a picture."""
    return sum(any(isinstance(part, Picture) for part in prompt) for prompt in prompts)


def test_prompts_come_as_words_alone_as_often_as_asked(dataset):
    def prompts(share, **settings):
        chosen = TrainSettings(prompt_dropout=0.0, picture_dropout=share, batch_size=8, **settings)
        sizes = dict.fromkeys(range(len(dataset.records)), (4, 4))
        lessons = Lessons(dataset, chosen, TOKENS, sizes)
        return [prompt for step in range(40) for prompt in lessons.lesson(step, 0).prompts]

    held = {share: pictures_in(prompts(share)) / 320 for share in (0.0, 0.3, 0.9)}
    assert held[0.0] == 1.0
    assert held[0.3] == pytest.approx(0.7, abs=0.08)
    assert held[0.9] == pytest.approx(0.1, abs=0.06)
    assert {len(prompt) for prompt in prompts(0.9, align_steps=1) if not pictures_in([prompt])} == {1}


def test_words_alone_are_one_text_and_a_prompt_without_words_keeps_its_picture():
    picture = Picture(torch.rand(8, 8, 3), TOKENS, 1.0, "dog")
    assert in_words(("a ", picture, " dog in the ", picture, " park")) == ("a dog in the park",)
    assert in_words((picture,)) == (picture,)


@pytest.mark.parametrize("kind", ["idefics3", *tiny_vlm.QWENS])
def test_every_family_is_aligned(kind, tmp_path):
    other = load_vlm(tiny_vlm.write(tmp_path / kind, kind), "float32")
    prompt = ("a ", Picture(torch.rand(8, 8, 3), TOKENS, 1.0, "dog"), " dog standing")
    said = Speaker(tiny_models.unet(), Clip()).say(other, prompt, prompt)
    assert len(said.weight) == len(other.tokenised(prompt)[0])
    assert said.weight.min() > 0
    states = Clip().encode_from_tokens(Clip().tokenize("a dog standing"))[0][0]
    torch.testing.assert_close(said.wanted()[-1], states[3])


# ---- what each lesson changes


def test_each_lesson_changes_its_own_weights_alone(vlm, dataset):
    both = {"align_steps": 1, "read_steps": 1, "steps": 1, "train_language": True, "language_rate": 1e-2}
    parts, seen = ("network", "unet", "language"), []
    watch = Watch(save=lambda snapshot: seen.append({part: part_of(snapshot.state, part) for part in parts}))
    fit(vlm, dataset, save_every=1, watch=watch, **both)
    begun = fit(vlm, dataset, steps=1, connector_rate=0.0, unet_rate=0.0, language_rate=0.0, train_language=True)
    stages = [{part: part_of(begun.snapshot.state, part) for part in parts}, *seen]
    changed = [
        {part for part in parts if not torch.equal(one[part], other[part])} for one, other in itertools.pairwise(stages)
    ]
    assert changed == [{"network", "language"}, {"unet"}, set(parts)]


def test_the_connector_learns_to_say_what_the_text_encoder_says(vlm, dataset):
    trained = fit(vlm, dataset, align_steps=60, steps=1)
    part = trained.history.by_lesson()[ALIGN]
    assert len(part.losses) == 60
    assert part.recent() < 0.5 * part.early()


def test_the_unet_learns_to_read_what_is_said_without_mistakes(vlm, dataset, monkeypatch):
    """On the same noise every time, so that the loss has nothing else to fall by."""
    from palimpsest.nodes.multimodal.training import lessons

    plain = lessons.generator_at
    monkeypatch.setattr(
        lessons, "generator_at", lambda s, what, *r: plain(s, what, 0, r[-1]) if what == "row" else plain(s, what, *r)
    )
    model = tiny_models.unet()
    with torch.inference_mode():
        model.model.diffusion_model.out[2].weight.mul_(6)
    one = interleaved_dataset.Dataset(dataset.folder, dataset.records[:1], dataset.recipe)
    losses = fit(vlm, one, model=model, read_steps=30, steps=1).history.by_lesson()[READ].losses
    assert losses[-1] < 0.98 * losses[0]


def test_no_steps_of_lessons_are_the_training_without_them(vlm, dataset):
    """Whatever their rates, with or without a text encoder."""
    one = fit(vlm, dataset, steps=3, clip=None)
    other = fit(vlm, dataset, steps=3, align_steps=0, read_steps=0, align_rate=0.1, read_rate=0.1)
    assert one.snapshot.state.keys() == other.snapshot.state.keys()
    assert all(torch.equal(tensor, other.snapshot.state[name]) for name, tensor in one.snapshot.state.items())
    assert "lessons" not in one.snapshot.state
    assert multimodal_training.describe(one) == multimodal_training.describe(other)
    assert "align_steps" not in one.snapshot.info


def test_the_model_stays_as_it_was(vlm, dataset):
    model = tiny_models.unet()
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    hidden = vlm.hidden_states([("a dog",)]).states.clone()
    fit(vlm, dataset, model=model, **LESSONS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.model.state_dict().items())
    assert torch.equal(vlm.hidden_states([("a dog",)]).states, hidden)


@pytest.mark.parametrize("pooled", ["zeros", "learned", "CLIP text"])
def test_sdxl_takes_every_lesson_with_each_pooled_output(vlm, dataset, pooled):
    trained = fit(vlm, dataset, "sdxl", pooled_output=pooled, **LESSONS)
    assert trained.history.by_lesson().keys() == {ALIGN, READ, DRAW}
    assert all(torch.isfinite(t).all() for t in trained.snapshot.state.values())


def test_rates_rise_and_fall_within_each_lesson(vlm, dataset, monkeypatch):
    """By hand: a rise of two steps, then a cosine over the rest of the lesson's."""
    rates, begin = [], Learner.begin

    def noted(self, step, end):
        begin(self, step, end)
        rates.append([optimiser.param_groups[0]["lr"] for _, optimiser, _ in self.optimisers])

    monkeypatch.setattr(Learner, "begin", noted)
    given = {"align_steps": 5, "read_steps": 4, "steps": 3, "warmup": 2, "schedule": COSINE, "train_unet": True}
    fit(vlm, dataset, align_rate=1e-3, read_rate=2e-3, connector_rate=4e-3, unet_rate=8e-3, **given)
    network, unet = torch.tensor(rates, dtype=torch.float64).T
    align, read, draw = [0.5, 1.0, 1.0, 0.75, 0.25], [0.5, 1.0, 1.0, 0.5], [0.5, 1.0, 1.0]
    assert network[:5].tolist() == pytest.approx([1e-3 * share for share in align])
    assert unet[5:9].tolist() == pytest.approx([2e-3 * share for share in read])
    assert network[9:].tolist() == pytest.approx([4e-3 * share for share in draw])
    assert unet[9:].tolist() == pytest.approx([8e-3 * share for share in draw])


def test_snr_plus_1_counts_the_error_of_x_0_where_noise_is_strong(vlm, dataset):
    """The first loss of each picture is the plain one times 1 + sigma^2; a v model's own loss is that already."""
    for prediction, factor in (("EPS", lambda sigma: 1 + sigma**2), ("V_PREDICTION", torch.ones_like)):
        first = []
        for weighting in (AS_TRAINED, SNR_PLUS_1):
            model = tiny_models.unet(prediction=prediction)
            fitted = fit(vlm, dataset, model=model, steps=1, weighting=weighting, train_unet=False)
            first.append(torch.tensor([loss for _, _, loss in fitted.history.points], dtype=torch.float64))
        shares = torch.tensor([share for _, share, _ in fitted.history.points])
        sigmas = model.get_model_object("model_sampling").sigmas
        sigma = sigmas[((1 - shares) * len(sigmas)).long().clamp(0, len(sigmas) - 1)].double()
        torch.testing.assert_close(first[1] / first[0], factor(sigma), rtol=1e-4, atol=0.0)


# ---- going on


@pytest.mark.parametrize("cut", [2, 3, 4, 5, 6])
def test_a_training_cut_off_in_or_between_lessons_goes_on_bit_for_bit(vlm, dataset, monkeypatch, cut):
    monkeypatch.setattr(fitting, "READ_AHEAD", 2)
    chosen = LESSONS | {"warmup": 3, "prompt_dropout": 0.3, "picture_dropout": 0.3}
    chosen |= {"weighting": SNR_PLUS_1, "schedule": COSINE}
    whole = fit(vlm, dataset, **chosen)
    step, kept = Fit.step, []

    def stop(self, number, lessons):
        if number == cut and not kept:
            raise comfy.model_management.InterruptProcessingException
        step(self, number, lessons)

    monkeypatch.setattr(Fit, "step", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fit(vlm, dataset, watch=Watch(save=lambda snapshot: kept.append(snapshot)), **chosen)
    monkeypatch.setattr(Fit, "step", step)
    assert int(kept[0].state["steps"]) == cut
    again = fit(vlm, dataset, state=kept[0].state, **chosen | {"steps": 7 - max(cut, 5)})
    assert again.history.steps == 7
    assert again.history.losses == whole.history.losses[cut:]
    assert again.snapshot.state.keys() == whole.snapshot.state.keys()
    for name, tensor in whole.snapshot.state.items():
        assert torch.equal(tensor, again.snapshot.state[name]), name


def test_a_training_goes_on_only_with_its_own_lessons(vlm, dataset, folder):
    first = fit(vlm, dataset, **LESSONS)
    with pytest.raises(ValueError, match="began with align_steps 3 and read_steps 2, here they are 0 and 0"):
        fit(vlm, dataset, state=first.snapshot.state)
    plain = fit(vlm, dataset)
    with pytest.raises(ValueError, match="began with align_steps 0 and read_steps 0, here they are 3 and 2"):
        fit(vlm, dataset, state=plain.snapshot.state, **LESSONS)
    (folder / "palimpsest_trainings").mkdir(exist_ok=True)
    written = training_files.TrainingFiles.new("mine", True)
    written.save(first.snapshot)
    state = training_files.load_state(str(folder / "palimpsest_trainings" / "mine_00001.safetensors"))
    assert state["lessons"].tolist() == [3, 2]


# ---- the node


def test_the_node_takes_all_lessons_and_tells_each(vlm, dataset, folder):
    chosen = {"model": tiny_models.unet(), "vae": tiny_models_vae(), "dataset": dataset, "clip": Clip(), "folder": "",
              "multimodal_encoder": MultimodalEncoder(vlm), "resume": "(new)"}  # fmt: skip
    encoder, _, _, plotted, report = tiny_models.execute(TrainMultimodal, **chosen | QUICK | LESSONS)
    assert report.startswith("7 steps (7 in all), align 3: error of the tokens ")
    assert "; read 2: loss " in report and "; draw 2: loss " in report
    assert encoder.connector.info["align_steps"] == 3 and encoder.connector.info["steps"] == 7
    assert plotted.shape[1] == 4 * 190
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == {
        "loras", "palimpsest_connectors", "palimpsest_trainings",
    }  # fmt: skip


def test_progress_names_the_lesson_and_its_step(vlm, dataset):
    told, shown = [], []
    fit(vlm, dataset, watch=Watch(tell=told.append, show=lambda step, _: shown.append(step)), **LESSONS)
    assert told[0].startswith("align 1 of 3 (step 1 of 7), loss ")
    assert told[4].startswith("read 2 of 2 (step 5 of 7), loss ")
    assert told[6].startswith("draw 2 of 2 (step 7 of 7), loss ")
    assert shown == list(range(7))


def test_presets_say_what_they_are_named_for():
    paper = TrainSettings.of({"preset": "paper", "align_steps": 9, "connector_rate": 0.1})
    assert (paper.align_steps, paper.read_steps) == (0, 0)
    assert (paper.connector_rate, paper.language_rate, paper.unet_rate) == (1e-5, 3e-6, 5e-6)
    assert paper.train_unet and paper.train_language and paper.lora_rank == 8 and paper.depth == 16
    ours = TrainSettings.of({"preset": "in lessons", "steps": 7})
    assert ours.align_steps > 0 and ours.read_steps > 0 and ours.train_unet and ours.steps == 7
    assert (paper.picture_dropout, ours.picture_dropout) == (0.0, 0.1)
    assert paper.crop_weight == 1.0 < ours.crop_weight
    assert TrainSettings.of({"preset": "as set above", "seed": 3}) == TrainSettings(seed=3)


def test_nothing_is_planned_that_cannot_be_taken(vlm, dataset):
    with pytest.raises(ValueError, match=r"align_steps is 3 and read_steps 0: .* connect clip, or set both to 0"):
        fit(vlm, dataset, align_steps=3, clip=None)
    with pytest.raises(ValueError, match=r"read_steps is 2: .* train_unet is off: switch it on"):
        fit(vlm, dataset, read_steps=2, train_unet=False)
    with pytest.raises(ValueError, match=r"clip has 32 channels, this model reads prompts of 24"):
        fit(vlm, dataset, align_steps=1, clip=Clip(32))


def test_words_that_the_text_encoder_reads_otherwise_are_told():
    class Odd(Clip):
        def tokenize(self, text, return_word_ids=False):
            return super().tokenize(text.replace("a b", "ab"), return_word_ids)

    with pytest.raises(ValueError, match=r"reads 'a b zyxwv' in \d+ pieces, its words one by one in \d+: take"):
        Speaker(tiny_models.unet(), Odd()).of(["a", "b", "zyxwv"])


def test_nan_in_a_lesson_keeps_what_was_learned_before(vlm, dataset, monkeypatch):
    reading = Fit.reading
    monkeypatch.setattr(Fit, "reading", lambda self, lesson: reading(self, lesson) * float("nan"))
    trained = fit(vlm, dataset, align_steps=2, read_steps=9)
    assert "no number" in trained.history.stopped
    assert len(trained.history.losses) == 5
    good = fit(vlm, dataset, align_steps=2, steps=1, connector_rate=0.0, unet_rate=0.0)
    for part in ("network", "unet"):
        assert torch.equal(part_of(trained.snapshot.state, part), part_of(good.snapshot.state, part))
    assert plot.draw(trained.history).shape[0] == 1


# ---- what the lessons are shown


def test_no_other_model_is_asked_while_the_unet_runs(vlm, dataset, monkeypatch):
    """Pictures that are shown on the way are encoded before, whether they are trained on or not."""
    inside, asked, run = [], [], Fit.run_in_sampler

    def noted(self):
        inside.append(1)
        run(self)
        inside.clear()

    def encode(self, pixels):
        asked.append(bool(inside))
        return tiny_models.AveragingVAE.encode(self, pixels)

    monkeypatch.setattr(Fit, "run_in_sampler", noted)
    vae = tiny_models_vae()
    monkeypatch.setattr(type(vae), "encode", encode, raising=False)
    monkeypatch.setattr(f"{__name__}.tiny_models_vae", lambda: vae)
    fit(vlm, dataset, steps=1, batch_size=1, preview_every=1)
    assert len(asked) == len(dataset.records)
    assert not any(asked)


@pytest.mark.parametrize(("size", "cells"), [((64, 48), (8, 6)), ((515, 509), (64, 63)), ((4032, 3024), (72, 56))])
def test_photos_are_trained_at_the_models_size(size, cells):
    assert encoding.trained_cells(size, 512) == cells
    picture = torch.rand(1, size[1] // 8, size[0] // 8, 3)
    wanted = picture.shape[2] // 8, picture.shape[1] // 8
    assert encoding.in_cells(picture, *wanted) is picture
    assert encoding.in_cells(picture, 1, 1).shape == (1, 8, 8, 3)


def test_the_more_batches_a_step_has_the_fewer_steps_are_read_ahead(vlm, dataset, monkeypatch):
    parts, ahead = [], Fit.ahead
    monkeypatch.setattr(fitting, "READ_AHEAD", 4)
    monkeypatch.setattr(Fit, "ahead", lambda self, steps: parts.append(len(steps)) or ahead(self, steps))
    fit(vlm, dataset, steps=3, batch_size=1, gradient_accumulation=4)
    assert parts == [1, 1, 1]
