"""The demo's world, and its judge, who must neither pass a wrong picture nor fail a right one."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from joyjax.shapes import wording
from joyjax.shapes.advice import advice, known_share
from joyjax.shapes.draw import box_of, render
from joyjax.shapes.edits import KINDS, Edit, Pair, apply, combination, held_out, pairs, propose, reverse
from joyjax.shapes.judge import judge
from joyjax.shapes.scene import (
    CELLS,
    COLORS,
    GROUNDS,
    RADII,
    SHAPES,
    SIDE,
    TEXTURES,
    Ground,
    Scene,
    Thing,
    legible,
    random_scene,
)
from joyjax.shapes.wording import refer, sentence

RED = Thing("circle", "red", "medium", 24, 24)
BLUE = Thing("square", "blue", "large", 104, 64)
TWO = Scene(Ground("white", "plain"), (RED, BLUE))


def some(kind: str, count: int = 20, held: bool = True, seed: int = 0) -> list[Pair]:
    drawn = pairs(np.random.default_rng(seed), kind, held=held)
    return [next(drawn) for _ in range(count)]


def test_a_scene_is_drawn_as_it_says():
    pixels = render(TWO)
    assert (pixels.shape, pixels.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert tuple(pixels[24, 24]) == COLORS["red"]
    assert tuple(pixels[64, 104]) == COLORS["blue"]
    assert tuple(pixels[120, 10]) == GROUNDS["white"]
    covered = Scene(TWO.ground, (BLUE, dataclasses.replace(RED, x=100, y=64)))
    assert tuple(render(covered)[64, 100]) == COLORS["red"]  # later things lie on top


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", RADII)
def test_a_shape_fills_its_box_and_no_more(shape, size):
    thing = Thing(shape, "red", size, 64, 64)
    bare, pixels = render(Scene(TWO.ground, ())), render(Scene(TWO.ground, (thing,)))
    rows, columns = np.nonzero((pixels != bare).any(axis=-1))
    box = box_of(thing)
    assert box[0].start <= rows.min() <= box[0].start + 4
    assert box[0].stop - 5 <= rows.max() < box[0].stop
    assert box[1].start <= columns.min() <= box[1].start + 4
    assert box[1].stop - 5 <= columns.max() < box[1].stop


def test_colors_and_textures_are_distinguishable():
    values = np.array([*COLORS.values(), *GROUNDS.values()], float)
    distance = np.linalg.norm(values[:, None] - values, axis=-1) + 1000 * np.eye(len(values))
    assert distance.min() > 40
    drawn = {texture: render(Scene(Ground("grey", texture), ())) for texture in TEXTURES}
    assert len({pixels.tobytes() for pixels in drawn.values()}) == len(TEXTURES)


def test_the_same_seed_gives_the_same_world():
    def world(seed):
        rng = np.random.default_rng(seed)
        return [(render(random_scene(rng)).tobytes(), *map(str, some(kind, 2, seed=seed))) for kind in KINDS]

    assert world(3) == world(3)
    assert world(3) != world(4)


def test_scenes_are_legible_and_varied():
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(300)]
    assert all(legible(scene) for scene in scenes)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3, 4}
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.cell for thing in things} == {*CELLS, None}
    boxes = [[box_of(thing) for thing in scene.things] for scene in scenes]
    overlaps = sum(
        any(a[0].start < b[0].stop and b[0].start < a[0].stop and a[1].start < b[1].stop and b[1].start < a[1].stop
            for n, a in enumerate(group) for b in group[:n])
        for group in boxes
    )  # fmt: skip
    assert 30 < overlaps < 150


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_what_it_says_and_nothing_else(kind):
    for pair in some(kind, 40, held=False):
        source, target, edit = pair.source, pair.target, pair.edit
        assert target == apply(source, edit) != source
        assert legible(target)
        changed = [n for n, (a, b) in enumerate(zip(source.things, target.things, strict=False)) if a != b]
        grown = len(target.things) - len(source.things)
        expected = {"add": 1, "remove": -1}.get(kind, 0)
        assert grown == expected
        assert (source.ground != target.ground) == (kind == "background")
        if kind in ("recolor", "shape", "resize", "move"):
            assert changed == [edit.index]
            name = {"recolor": "color", "shape": "shape", "resize": "size", "move": "cell"}[kind]
            assert getattr(target.things[edit.index], name) == edit.value
        if kind == "swap":
            assert sorted(changed) == sorted((edit.index, edit.other))


@pytest.mark.parametrize("kind", KINDS)
def test_reversing_undoes(kind):
    backs = [reverse(pair) for pair in some(kind, 60, held=False)]
    undone = [back for back in backs if back is not None]
    assert len(undone) >= 5
    for pair, back in zip(some(kind, 60, held=False), backs, strict=True):
        if back is not None:
            assert back.source == pair.target
            assert apply(back.source, back.edit) == back.target == pair.source


def test_one_combination_in_eight_is_held_out():
    rng = np.random.default_rng(0)
    drawn = [pair for kind in KINDS for _ in range(400) if (pair := propose(rng, random_scene(rng), kind))]
    names = {combination(pair) for pair in drawn}
    held = {combination(pair) for pair in drawn if held_out(pair)}
    assert 0.08 < len(held) / len(names) < 0.17
    assert not held & {combination(pair) for pair in drawn if not held_out(pair)}
    assert {name.partition(":")[0] for name in held} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_wording_names_what_it_needs(kind):
    rng = np.random.default_rng(0)
    said = [(pair, sentence(rng, pair).lower()) for pair in some(kind, 100, held=False)]
    assert len({text for _, text in said}) > 40
    for pair, text in said:
        assert "{" not in text
        if kind in ("recolor", "shape", "background"):
            forms = [pair.edit.value, *wording.SYNONYMS.get(pair.edit.value, ())]
            assert any(form in text for form in forms)
        if kind == "add":
            assert pair.edit.thing.shape in text


def test_words_mean_one_thing():
    rng = np.random.default_rng(0)
    alike = Scene(TWO.ground, (RED, dataclasses.replace(BLUE, shape="circle")))
    said = {refer(rng, alike, 0) for _ in range(200)}
    assert said == {"the red circle", "the red shape", "the red one"}  # not "the circle"
    same_color = Scene(TWO.ground, (RED, dataclasses.replace(BLUE, color="red")))
    assert {refer(rng, same_color, 0) for _ in range(200)} == {"the red circle", "the circle"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_passes_the_right_picture_and_not_the_untouched_one(kind):
    for pair in some(kind, 25):
        right = judge(pair, render(pair.target))
        assert (right.pixel, right.strict, right.psnr) == (True, True, float("inf"))
        assert not judge(pair, render(pair.source)).strict


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_forgives_noise_and_blur(kind):
    rng = np.random.default_rng(1)
    for pair in some(kind, 10):
        expected = render(pair.target).astype(float)
        noisy = np.clip(expected + rng.normal(0, 4, expected.shape), 0, 255).astype(np.uint8)
        blurred = np.asarray(Image.fromarray(render(pair.target)).resize((112, 112)).resize((128, 128)))
        for picture in (noisy, blurred):
            verdict = judge(pair, picture)
            assert verdict.pixel
            assert verdict.strict
            assert 20 < verdict.psnr < 60


@pytest.mark.parametrize(("name", "values"), [("shape", SHAPES), ("color", COLORS), ("size", RADII)])
def test_the_strict_test_sees_one_wrong_attribute(name, values):
    rng = np.random.default_rng(2)
    for pair in some("recolor", 10):
        index = int(rng.integers(len(pair.target.things)))
        wrong = [value for value in values if value != getattr(pair.target.things[index], name)]
        for value in wrong:
            picture = render(pair.target.with_thing(index, **{name: value}))
            if not np.array_equal(picture, render(pair.target)):
                assert not judge(pair, picture).strict, f"{name} {value} for {pair.target.things[index]}"


def test_the_tests_see_what_is_elsewhere():
    pair = Pair(TWO, Edit("recolor", 0, value="green"), apply(TWO, Edit("recolor", 0, value="green")))
    spot = render(pair.target)
    spot[100:110, 20:30] = 0
    assert not judge(pair, spot).strict
    assert not judge(pair, spot).pixel
    other_ground = dataclasses.replace(pair.target, ground=Ground("white", "striped"))
    assert not judge(pair, render(other_ground)).strict


def test_what_the_demo_learned_needs_no_advice():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for pair in some(kind, 40, held=False):
            assert advice(sentence(rng, pair), (Image.fromarray(render(pair.source)),)) == []


@pytest.mark.parametrize(
    ("prompt", "picture", "says"),
    [
        ("make the sky red", render(TWO), "never saw the words 'sky'"),
        ("Mache den Kreis blau", render(TWO), "'mache', 'den', 'kreis', 'blau'"),
        ("", render(TWO), "no words"),
        ("…!?", render(TWO), "no words"),
        ("make the red circle blue", None, "give one with --image"),
        (
            "make the red circle blue",
            np.random.default_rng(0).integers(0, 255, (128, 128, 3)),
            "outside of the demo's",
        ),
        ("make the red circle blue", render(TWO)[:96], "this one is 128 × 96"),
    ],
)
def test_requests_outside_of_the_training_domain_get_advice(prompt, picture, says):
    pictures = () if picture is None else (Image.fromarray(np.uint8(picture)),)
    assert says in "\n".join(advice(prompt, pictures))


def test_photographs_are_outside_of_the_training_domain(reference_files):
    for name in ("test_1.jpg", "test_2.jpg", "test_3.png"):
        picture = Image.open(reference_files / "images" / name)
        assert "outside of the demo's" in "\n".join(advice("make the red circle blue", (picture,)))


def test_enlarged_pictures_of_shapes_are_known():
    picture = Image.fromarray(render(TWO)).resize((512, 512), Image.Resampling.BICUBIC)
    assert known_share(picture) > 0.97
