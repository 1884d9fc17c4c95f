"""Few-step models: what they learn from their teacher, against closed forms, and runs that go on from another run."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import imagekiln
from imagekiln import data as datasets
from imagekiln.config import read_toml
from imagekiln.core import Progress
from imagekiln.diffusion import distillation, paths, samplers
from imagekiln.diffusion.distillation import Distillation, Lesson
from imagekiln.diffusion.drawing import Drawing
from imagekiln.engine import recipe as recipes
from imagekiln.engine import stability as looking
from imagekiln.engine.bench import Bench
from imagekiln.engine.generate import asked_for, pictured
from imagekiln.engine.inputs import begin
from imagekiln.engine.models import open_model
from imagekiln.engine.run import Run
from imagekiln.errors import RecipeError, UsageError
from imagekiln.nets.clip_text import Encoded
from imagekiln.nets.conditioned import denoiser as conditioned
from imagekiln.nets.feature_heads import FeatureHeads
from imagekiln.nets.unet import UNet, UNetConfig

TRAIN = {"batch": 16, "total_kimg": 0.128, "precision": "fp32", "checkpoint_kimg": 0.032}
PIXELS = {"name": "diffusion", "widths": [16], "attention": [False], "sample": {"steps": 4, "guidance": 1.5}}
WORDS = {
    "name": "stable_diffusion",
    "depth": 1,
    "text": {"width": 32, "layers": 2, "context": 8, "vocabulary": 520},
    "sample": {"steps": 4},
}
SPREAD = 0.5
"""Standard deviation of the Gaussian data whose denoiser and path are known."""


def gaussian(path: paths.Path) -> samplers.Denoiser:
    """The exact denoiser of data from N(0, SPREAD^2)."""

    def denoise(z: Tensor, sigma_B: Tensor) -> Tensor:
        sigma = paths.expand(sigma_B.double(), z)
        a, _ = path.scales(sigma)
        return (z.double() / a * SPREAD**2 / (SPREAD**2 + sigma**2)).to(z.dtype)

    return denoise


# -- what is learned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rf", "vp"])
def test_the_goal_is_the_end_of_the_path(name: str) -> None:
    """For Gaussian data the path's end is y s / sqrt(s^2 + sigma^2), y = z / a (Karras et al. 2022, equation 1)."""
    path, level = paths.path(name), 3.0
    z = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, _ = path.scales(torch.tensor(level, dtype=torch.float64))
    exact = z / a * SPREAD / (SPREAD**2 + level**2) ** 0.5
    apart = [
        (distillation.goal(gaussian(path), z, level, path, steps) - exact).abs().max().item() for steps in (16, 64, 256)
    ]
    assert apart[0] > 3 * apart[1] > 9 * apart[2], "first order"
    assert apart[2] < 0.02


@pytest.mark.parametrize(("level", "calls"), [(160.0, 4), (3.0, 3), (1.0, 2), (0.1, 1)])
def test_steps_are_as_large_from_every_level(level: float, calls: int) -> None:
    seen: list[float] = []

    def teacher(z: Tensor, sigma_B: Tensor) -> Tensor:
        seen.append(float(sigma_B[0]))
        return torch.zeros_like(z)

    distillation.goal(teacher, torch.zeros(2, 3), level, paths.path("rf"), 4)
    times = [sigma / (1 + sigma) for sigma in [*seen, 0.0]]
    assert len(seen) == calls and seen[0] == pytest.approx(level)
    assert [a - b for a, b in itertools.pairwise(times)] == pytest.approx([times[0] / calls] * calls)


def test_where_the_student_arrives() -> None:
    """A student that always answers 0 leaves b eps at every level; the first is pure noise times its own b."""
    path, eps, found = paths.path("vp"), torch.randn(4, 3), set()
    for seed in range(24):
        torch.manual_seed(seed)
        z, level = distillation.arrived(lambda z, sigma_B: torch.zeros_like(z), eps, (80.0, 1.0), path)
        _, b = path.scales(torch.tensor(level, dtype=torch.float64))
        torch.testing.assert_close(z, (b * eps).float())
        found.add(level)
    assert found == {80.0, 1.0}


def test_a_student_is_on_the_ways_that_it_draws_in() -> None:
    """In 1, 2, 3 or 4 of four levels, in k of them 1 / k as often as in one, and at one of its k places."""
    settings, on = Distillation(levels=(8.0, 4.0, 2.0, 1.0)), paths.path("rf")
    ways = {tuple(settings.grid(Drawing(steps=steps, sampler="euler")).tolist()) for steps in (1, 2, 3, 4)}
    met: list[float] = []
    torch.manual_seed(0)
    for _ in range(4000):
        seen: list[float] = []

        def student(z: Tensor, sigma_B: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(float(sigma_B[0]))
            return z

        _, level = distillation.arrived(student, torch.zeros(1, 1), settings.levels, on)
        assert any(way[: len(seen) + 1] == (*seen, level) for way in ways)
        met.append(level)
    all_ways = 1 + 1 / 2 + 1 / 3 + 1 / 4
    expected = {
        8.0: (1 + 1 / 4 + 1 / 9 + 1 / 16) / all_ways,
        4.0: (1 / 9 + 1 / 16) / all_ways,
        2.0: (1 / 4 + 1 / 9 + 1 / 16) / all_ways,
        1.0: 1 / 16 / all_ways,
    }
    for level, share in expected.items():
        assert met.count(level) / len(met) == pytest.approx(share, abs=4 * (share / len(met)) ** 0.5)


def test_a_student_that_answers_the_goal_has_nothing_to_learn() -> None:
    path, like = paths.path("rf"), torch.zeros(6, 1, 2, 2)
    settings = Distillation(levels=(2.0,), teacher_steps=3, adversarial_weight=0.0)
    teacher = gaussian(path)

    def perfect(z: Tensor, sigma_B: Tensor) -> Tensor:
        return distillation.goal(teacher, z, float(sigma_B[0]), path, 3)

    lesson = Lesson(perfect, teacher, lambda z, sigma_B: [])
    loss = distillation.imitation(lesson, settings, path, like, torch.ones(6), Progress(1, 2))
    assert loss.total.item() == pytest.approx(distillation.FLOOR**0.5, abs=1e-6)
    torch.testing.assert_close(
        distillation.held_out(lesson, settings, path, like).values, torch.full((6,), distillation.FLOOR**0.5)
    )


def test_losses_against_their_formulas() -> None:
    """Both losses, recomputed in float64 from the same random numbers; the discriminator's weight rises."""
    path, settings = paths.path("rf"), Distillation(levels=(2.0,), teacher_steps=2, adversarial_weight=0.7)
    x, sigma_B = torch.randn(5, 1, 2, 2, dtype=torch.float64), torch.full((5,), 0.5, dtype=torch.float64)

    def student(z: Tensor, sigma_B: Tensor) -> Tensor:
        return 0.3 * z + 0.1

    def judge(z: Tensor, sigma_B: Tensor) -> list[Tensor]:
        return [2 * z.flatten(1) - 0.4, z.mean((1, 2, 3))[:, None] + 0.2]

    lesson = Lesson(student, gaussian(path), judge)
    torch.manual_seed(3)
    noise, _, _ = torch.randn_like(x), torch.multinomial(torch.ones(1), 1), torch.randint(1, ())
    one, other = torch.randn_like(x), torch.randn_like(x)
    z = noise * 2 / 3  # b of the flow at sigma 2
    y = 0.3 * z + 0.1
    end = distillation.goal(gaussian(path), z, 2.0, path, 2)
    apart = ((y - end).square().mean((1, 2, 3)) + 1e-4).sqrt().mean()
    seen = judge(y * 2 / 3 + one / 3, sigma_B)
    answer = -(seen[0].mean() + seen[1].mean()) / 2
    for progress, share in ((Progress(0, 100), 0.0), (Progress(2, 80), 0.5), (Progress(80, 80), 1.0)):
        torch.manual_seed(3)
        loss = distillation.imitation(lesson, settings, path, x, sigma_B, progress)
        torch.testing.assert_close(loss.total, apart + 0.7 * share * answer)
    torch.manual_seed(3)
    loss = distillation.discrimination(lesson, settings, path, x, sigma_B)
    real, fake = judge(x * 2 / 3 + one / 3, sigma_B), judge(y * 2 / 3 + other / 3, sigma_B)
    hinge = [(1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean() for a, b in zip(real, fake, strict=True)]
    torch.testing.assert_close(loss.total, (hinge[0] + hinge[1]) / 2)


@pytest.mark.parametrize("levels", [(1.0, 2.0), (1.0, 1.0), (1.0, 0.0), (-1.0,)])
def test_levels_that_do_not_fall_are_refused(levels: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match=r"family\.distillation\.levels"):
        Distillation(levels=levels).check(Drawing(steps=1, sampler="euler"))


def test_a_student_draws_by_the_rule_it_learned_with() -> None:
    student = Distillation(levels=(80.0, 4.0, 1.0))
    for name in ("euler", "ddim"):  # one rule
        student.check(Drawing(steps=3, sampler=name))
        assert student.grid(Drawing(steps=3, sampler=name)).tolist() == [80, 4, 1, 0]
    for name in ("dpmpp_2m", "heun"):
        with pytest.raises(RecipeError, match=r"family\.sample\.sampler to euler"):
            student.check(Drawing(steps=3, sampler=name))
        with pytest.raises(UsageError, match="Ask for euler"):
            student.grid(Drawing(steps=3, sampler=name))


def test_no_lesson_waits_for_a_device() -> None:
    """Tensors on "meta" stand for those of a device: whoever reads a number of theirs fails."""
    path, settings = paths.path("rf"), Distillation(levels=(8.0, 2.0))
    x, sigma_B = torch.empty(3, 1, 2, 2, device="meta"), torch.empty(3, device="meta")
    lesson = Lesson(lambda z, sigma_B: z / 2, lambda z, sigma_B: z / 3, lambda z, sigma_B: [z.flatten(1)])
    assert distillation.imitation(lesson, settings, path, x, sigma_B, Progress(1, 2)).total.is_meta
    assert distillation.discrimination(lesson, settings, path, x, sigma_B).total.is_meta
    assert distillation.held_out(lesson, settings, path, x).values.is_meta


# -- maps -------------------------------------------------------------------------------------------------------------


def test_maps_of_the_unet() -> None:
    """The middle's map is what the way up begins with: a net whose way up is cut answers the same."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(8, 1, 1, (8, 16), 1, (False, True), attention_head_dim=8, norm_num_groups=4))
    images, time_B = torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0])
    found, heard = net.maps(images, time_B), []
    hook = net.mid_block.register_forward_hook(lambda module, given, answer: heard.append(answer))
    net(images, time_B)
    hook.remove()
    assert torch.equal(found[-1], heard[0])
    assert [one.shape[1] for one in found] == net.map_widths
    assert [len(logits) for logits in FeatureHeads(net.map_widths)(found)] == [2] * 3


@pytest.mark.parametrize("kind", ["sd3", "unet"])
def test_maps_of_denoisers_that_read(kind: str) -> None:
    net = conditioned(kind, (4, 8, 8), depth=2, widths=(32, 64), text_width=32)
    text = Encoded(torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(2, 32))
    z = torch.randn(2, 4, 8, 8, requires_grad=True)
    found = net.maps(z, torch.tensor([10.0, 900.0]), text)
    assert [one.shape[-1 if one.ndim == 3 else 1] for one in found] == net.map_widths
    assert not any(module._forward_hooks for module in net.modules()), "nothing listens afterwards"
    sum(logits.sum() for logits in FeatureHeads(net.map_widths)(found)).backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


# -- runs that go on --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A short run of each family that can be a teacher."""
    folder = tmp_path_factory.mktemp("teachers")
    coder = {"kind": "tiny", "width": 8, "factor": 2, "adversarial_weight": 0.0}
    settings = {"family": coder, "train": TRAIN}
    codec = imagekiln.train("autoencoder", "builtin:digits", folder / "codec", settings=settings)
    runs = {}
    for family, data in ((PIXELS, {}), (WORDS, {"codec": str(codec.path)})):
        settings = {"family": family, "data": data, "train": TRAIN | {"total_kimg": 1.0}}
        runs[family["name"]] = imagekiln.train(
            family["name"], "builtin:digits", folder / family["name"], settings=settings
        )
    return runs


def learn(teacher: Run, out: Path, recipe: str = "few-step", data: str = "", **train: object) -> Run:
    return imagekiln.train(recipe, data, out, begin_with=teacher.path, settings={"train": TRAIN | train})


@pytest.mark.parametrize("family", ["diffusion", "stable_diffusion"])
def test_a_student_comes_closer_to_its_teacher(family: str, trained: dict[str, Run], tmp_path: Path) -> None:
    student = learn(trained[family], tmp_path / "student", total_kimg=1.5)
    held_out = [row["validation/denoise"] for row in student.stats() if "validation/denoise" in row]
    assert held_out[-1] < 0.8 * held_out[0]
    for steps in (1, 2):
        drawn = imagekiln.generate(student, 4, tmp_path / f"in {steps}", steps=steps)
        assert len(drawn.pictures) == 4
    with pytest.raises(UsageError, match="at most 2"):
        imagekiln.generate(student, 1, tmp_path / "in three", steps=3)
    recipe = read_toml(student.recipe_path)
    assert recipe["family"]["teacher"] == recipe["train"]["start"] == str(trained[family].path)
    assert recipe["data"]["path"] == "builtin:digits"


def test_a_student_is_looked_at_in_the_ways_it_can_draw(trained: dict[str, Run], tmp_path: Path) -> None:
    student = learn(trained["diffusion"], tmp_path / "student")
    recipe = recipes.complete(read_toml(student.recipe_path))
    bench = Bench(datasets.load(recipe.data), "randconv", seed=0, say=print, subject_hash="")
    look = looking._Look(student, recipe, "student", (), bench, bench, count=40)
    look.model = open_model(student)
    found, _ = looking._sampling(look, lambda sentence: None)
    assert {(one.sampler, one.steps) for one in found} == {("euler", 1), ("euler", 2), ("ddim", 2)}


@pytest.mark.parametrize("family", ["diffusion", "stable_diffusion"])
def test_a_student_is_exported_like_its_teacher(family: str, trained: dict[str, Run], tmp_path: Path) -> None:
    student = learn(trained[family], tmp_path / "student")
    receipt = imagekiln.export(student, "diffusers", tmp_path / "out")
    assert receipt["difference"] <= 1e-4
    card = tmp_path / "out" / "README.md"
    assert not card.is_file() or "from the times 993.8, 500.0 (of 1000)" in card.read_text()
    assert card.is_file() == (family == "stable_diffusion")


def test_the_exported_pipeline_draws_in_two_steps_what_the_student_draws(
    trained: dict[str, Run], tmp_path: Path
) -> None:
    diffusers = pytest.importorskip("diffusers")
    student = learn(trained["stable_diffusion"], tmp_path / "student")
    call = imagekiln.export(student, "diffusers", tmp_path / "out")["call"]
    assert "sigmas=[0.993789, 0.5], guidance_scale=1.0" in call
    family = open_model(student, device="cpu").family
    noise = torch.randn(1, *family.noise_shape(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = pictured(family, noise, asked_for(family, ["3"])) / 2 + 0.5
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "out", text_encoder_3=None, tokenizer_3=None
    )
    theirs = pipeline(
        "3", sigmas=[160 / 161, 0.5], guidance_scale=1.0, height=8, width=8, max_sequence_length=0, output_type="pt",
        latents=noise * 160 / 161,
    ).images  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["diffusion", "stable_diffusion"])
def test_a_student_begins_as_its_teacher_and_resumes_exactly(
    family: str, trained: dict[str, Run], tmp_path: Path
) -> None:
    whole = learn(trained[family], tmp_path / "whole")
    recipe = recipes.complete(read_toml(whole.recipe_path))
    before, first = open_model(trained[family]).family, begin(recipe, datasets.load(recipe.data)).family
    for name in before.averaged:
        ours, its = first.get_submodule(name).state_dict(), before.get_submodule(name).state_dict()
        assert all(torch.equal(ours[key], its[key]) for key in its)
    parts = Path(shutil.copytree(whole.path, tmp_path / "parts"))
    for stored in sorted((parts / "checkpoints").iterdir())[1:]:
        shutil.rmtree(stored)
    whole_weights = parts / "weights" / whole.weights().name
    whole_weights.unlink()
    parts = learn(trained[family], parts)
    assert parts.weights() == whole_weights
    first, second = (load_file(run.weights()) for run in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_goes_on_with_other_pictures(trained: dict[str, Run], tmp_path: Path) -> None:
    """`--from` without a recipe: the same family and settings, other pictures, and no teacher."""
    imagekiln.prepare("builtin:digits", tmp_path / "set")
    again = learn(
        trained["diffusion"],
        tmp_path / "again",
        recipe="",
        data=str(tmp_path / "set"),
    )
    recipe = read_toml(again.recipe_path)
    assert recipe["data"]["path"] == str(tmp_path / "set")
    assert recipe["family"]["widths"] == PIXELS["widths"]
    assert not recipe["family"]["teacher"]


def test_what_cannot_go_on_is_refused(trained: dict[str, Run], tmp_path: Path) -> None:
    pixels = trained["diffusion"].path
    with pytest.raises(RecipeError, match="--from"):
        imagekiln.train("few-step", "builtin:digits", tmp_path / "alone")
    with pytest.raises(RecipeError, match="cannot begin with its weights"):
        imagekiln.train("vae", "builtin:digits", tmp_path / "vae", begin_with=pixels)
    with pytest.raises(RecipeError, match="do not fit"):
        imagekiln.train("", "", tmp_path / "wide", begin_with=pixels, assignments=["family.widths=[32]"])
    with pytest.raises(RecipeError, match=r"train\.start"):
        imagekiln.train("diffusion", "builtin:digits", tmp_path / "lost", assignments=["train.start='nowhere'"])
    with pytest.raises(RecipeError, match="holds a diffusion"):
        imagekiln.train("vae", "builtin:digits", tmp_path / "vae", assignments=[f"train.start='{pixels}'"])
    with pytest.raises(RecipeError, match=r"family\.sample\.steps = 3"):
        given = [f"family.teacher='{pixels}'", "family.sample.steps=3"]
        imagekiln.train("diffusion", "builtin:digits", tmp_path / "three", assignments=given)
    with pytest.raises(RecipeError, match="only learn from its own kind"):
        given = [f"family.teacher='{pixels}'", "family.sample.steps=2", "family.sample.sampler='euler'"]
        imagekiln.train(
            "stable_diffusion", "builtin:digits", tmp_path / "sd", settings={"family": WORDS}, assignments=given
        )
    teacher = trained["stable_diffusion"]
    words = WORDS | {
        "teacher": str(teacher.path),
        "text": {"base": "random:clip"},
        "sample": {"steps": 2, "sampler": "euler"},
    }
    with pytest.raises(RecipeError, match="reads texts as other tokens than this one"):
        settings = {"family": words, "data": {"codec": str(teacher.codec_path)}}
        imagekiln.train("stable_diffusion", "builtin:digits", tmp_path / "other", settings=settings)


def test_another_teacher_at_resume_is_refused(trained: dict[str, Run], tmp_path: Path) -> None:
    teacher = Run(Path(shutil.copytree(trained["diffusion"].path, tmp_path / "teacher")))
    learn(teacher, tmp_path / "student")
    shutil.rmtree(teacher.path)
    imagekiln.train(
        "diffusion", "builtin:digits", teacher.path, settings={"family": PIXELS, "train": TRAIN | {"seed": 1}}
    )
    with pytest.raises(UsageError, match=r"family\.teacher: what it names is not what it was"):
        learn(teacher, tmp_path / "student", total_kimg=0.256)


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("beside_the_benchmarks")
def test_the_benchmark_from_end_to_end(trained: dict[str, Run], tmp_path: Path) -> None:
    benchmark = importlib.import_module("few_step")
    given = ["--teacher", str(trained["diffusion"].path), "--out", str(tmp_path), "--kimg", "0.064", "--n", "40"]
    given += ["--teacher-steps", "4", "--features", "randconv", "--record", "--records", str(tmp_path)]
    assert benchmark.main(given) == 0
    record = json.loads(next(tmp_path.glob("few-step-*.json")).read_text())
    rows = {row["what"]: row["value"] for row in record["rows"]}
    assert benchmark.way("3:dpmpp_2m:edm") == {"steps": 3, "sampler": "dpmpp_2m", "spacing": "edm"}
    distances = [rows[f"{who}, frechet"] for who in ("student, 2 steps", "teacher, 4 steps")]
    assert rows["teacher, 4 even steps of euler, frechet"] not in distances
    assert rows["student in 2 / teacher in 4"] == pytest.approx(distances[0] / distances[1])
    assert (tmp_path / "few-step.png").is_file()
    assert benchmark.main([*given, "--skip-train", "--seeds", "7"]) == 2
