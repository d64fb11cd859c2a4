"""Options that trade exactness for time: guidance in the first steps alone, and blocks that are left out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import CONFIG, draw, make_condition, make_weights, mesh_of, name_of
from PIL import Image
from stagewise import Stages
from whole_step import cached_step, denoise_step

import joyjax
from joyjax.options import CacheRule
from joyjax.runtime.request import check_request
from joyjax.sampling import predictor
from joyjax.sampling.guided_step import predict
from joyjax.sampling.step_cache import empty_cache, predict_cached, relative_change
from joyjax.sharding.place import replicate

pytestmark = [
    pytest.mark.jax,
    pytest.mark.filterwarnings("ignore::joyjax.AdviceWarning"),  # the demo is given noise to edit
]

LEVELS = np.linspace(1, 0, 9, dtype=np.float32)
THREE = dataclasses.replace(CONFIG, num_layers=3)
TOKENS = (16, 48, 24)


def run(weights, latents, condition, *, kind="first-block", threshold=0.0, steps=8):
    """Return the latents after each step, and how often each edit has run all blocks by then."""
    cache = empty_cache(weights, latents, condition, kind=kind)
    seen, computed = [], []
    for n in range(steps):
        numbers = (LEVELS[n], LEVELS[n + 1], LEVELS[n] * 1000, np.float32(3))
        force = np.bool_(n in (0, steps - 1))
        latents, cache = cached_step(
            weights, latents, cache, condition, *numbers, np.float32(threshold), force, channels=CONFIG.in_channels
        )
        seen.append(np.asarray(latents))
        computed.append(np.asarray(cache.steps).tolist())
    return seen, computed


def run_exactly(weights, latents, condition, steps=8):
    for n in range(steps):
        numbers = (LEVELS[n], LEVELS[n + 1], LEVELS[n] * 1000, np.float32(3))
        latents = denoise_step(weights, latents, condition, *numbers, channels=CONFIG.in_channels)
    return np.asarray(latents)


def start(edits: int) -> jax.Array:
    return draw(4, edits, TOKENS[1], 16)


@pytest.fixture(scope="module")
def weights():
    return make_weights(THREE)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("first-block", 1),
        ("taylor", 2),
        pytest.param("first-block", 2, marks=pytest.mark.nightly),
        pytest.param("taylor", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_threshold_of_nothing_computes_every_step(kind, passes, weights, error):
    """To the last bits: inside a conditional XLA fuses other operations together than outside it."""
    condition = make_condition(1, passes, TOKENS, ragged=False)
    seen, computed = run(weights, start(1), condition, kind=kind)
    assert computed == [[n] for n in range(1, 9)]
    assert error(seen[-1], run_exactly(weights, start(1), condition)) < 1e-5


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_a_threshold_that_nothing_reaches_computes_the_first_and_the_last_step(kind, weights):
    _, computed = run(weights, start(1), make_condition(1, 2, TOKENS, ragged=False), kind=kind, threshold=1e6)
    assert computed == [[1]] * 7 + [[2]]


def test_steps_between_are_nearer_with_less_left_out(weights, error):
    condition = make_condition(1, 2, TOKENS, ragged=False)
    exact = run_exactly(weights, start(1), condition)
    runs = [run(weights, start(1), condition, threshold=threshold) for threshold in (0.5, 0.7, 1e6)]
    counts = [computed[-1][0] for _, computed in runs]
    errors = [error(seen[-1], exact) for seen, _ in runs]
    assert counts == sorted(counts, reverse=True)
    assert 8 > counts[0] > 2 == counts[-1]
    assert errors[0] < errors[-1]


def test_what_is_reused_is_what_the_blocks_added(weights, error):
    """The same step twice: the second, from the cache, gives what the first did, for each pass its own."""
    condition = make_condition(2, 2, TOKENS, ragged=True)
    cache = empty_cache(weights, start(2), condition, kind="taylor")
    numbers = (np.float32(0.8), np.float32(0.5), np.float32(800), np.float32(3), np.float32(0.01), np.bool_(False))
    options = {"channels": CONFIG.in_channels}
    first, cache = cached_step(weights, start(2), cache, condition, *numbers, **options)
    again, cache = cached_step(weights, start(2), cache, condition, *numbers, **options)
    assert np.asarray(cache.steps).tolist() == [1, 1]
    assert error(again, first) < 1e-5


def test_extrapolation_follows_a_line(weights, error):
    """Two computed steps whose rest is known give the third on the line through them, by sigma and not by number."""
    condition = make_condition(1, 1, TOKENS, ragged=False)
    caches, latents = [], []
    cache = empty_cache(weights, start(1), condition, kind="taylor")
    for level, force in ((1.0, True), (0.75, True), (0.25, False)):
        numbers = (np.float32(level), np.float32(level - 0.1), np.float32(level * 1000), np.float32(1))
        limit = np.float32(1e6), np.bool_(force)
        moved, cache = cached_step(weights, start(1), cache, condition, *numbers, *limit, channels=CONFIG.in_channels)
        caches.append(jax.tree.map(jnp.copy, cache))
        latents.append(moved)
    assert [cache.steps.tolist() for cache in caches] == [[1], [2], [2]]
    rest = caches[1].rest + (caches[1].rest - caches[0].rest) / (0.75 - 1.0) * (0.25 - 0.75)
    network = weights.module()
    first_output = network.first_block(start(1), jnp.full((1,), 250.0), condition)
    expected = start(1) - 0.1 * network.head(first_output.target() + rest, first_output)
    assert error(latents[2], expected) < 1e-4


@pytest.mark.parametrize("kind", [pytest.param("first-block", marks=pytest.mark.nightly), "taylor"])
def test_edits_of_a_batch_decide_for_themselves(kind, weights, error):
    """Three edits with other texts, lengths and decisions: each as if it were alone."""
    condition = make_condition(3, 2, TOKENS, ragged=True)
    seen, computed = run(weights, start(3), condition, kind=kind, threshold=0.65)
    assert len({tuple(counts) for counts in zip(*computed, strict=True)}) > 1  # or the test says nothing
    for n in range(3):
        own = jax.tree.map(lambda rows, n=n: rows[n::3], condition)
        alone, counts = run(weights, start(3)[n : n + 1], own, kind=kind, threshold=0.65)
        assert [count for (count,) in counts] == [each[n] for each in computed]
        valid = TOKENS[1] - 3 * n
        assert error(seen[-1][n, :valid], alone[-1][0, :valid]) < 1e-4


def test_padding_never_changes_the_decision():
    new, old = draw(0, 4, 6, 8), draw(1, 4, 6, 8)
    valid = jnp.arange(6) < jnp.asarray([6, 4, 6, 4])[:, None]
    change = relative_change(new, old, valid, 2)
    expected = [
        np.abs(np.asarray(new - old))[n::2, :size].sum() / np.abs(np.asarray(old))[n::2, :size].sum()
        for n, size in enumerate((6, 4))
    ]
    np.testing.assert_allclose(change, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, id=name_of(sizes), marks=() if len(sizes) == 3 else pytest.mark.nightly)
        for sizes in ({"sequence": 3}, {"cfg": 2, "sequence": 2, "tensor": 2}, {"data": 4, "cfg": 2})
    ],
)
def test_a_mesh_gives_the_same(sizes, weights, error):
    condition = make_condition(2, 2, (16, 47, 24), ragged=False)
    latents = draw(4, 2, 47, 16)
    alone, counts = run(weights, jnp.copy(latents), condition, kind="taylor", threshold=0.65)
    assert 2 < counts[-1][0] < 8
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        spread = replicate((latents, condition), mesh)
        seen, computed = run(make_weights(THREE, mesh), *spread, kind="taylor", threshold=0.65)
    assert [each[:2] for each in computed] == counts
    assert error(seen[-1], alone[-1]) < 1e-4


def test_a_step_donates_its_cache(weights):
    condition = make_condition(1, 2, TOKENS, ragged=False)
    cache, latents = empty_cache(weights, start(1), condition, kind="taylor"), start(1)
    numbers = (np.float32(n) for n in (0.8, 0.5, 800, 3, 0.1))
    cached_step(weights, latents, cache, condition, *numbers, np.bool_(True), channels=CONFIG.in_channels)
    assert latents.is_deleted()
    assert cache.first.is_deleted()
    assert cache.rest.is_deleted()


def test_steps_that_are_left_out_are_not_run(weights):
    """All blocks but the first stand inside a conditional of the compiled program, and nowhere else."""
    condition = make_condition(1, 2, TOKENS, ragged=False)
    cache = empty_cache(weights, start(1), condition, kind="first-block")
    numbers = (np.float32(n) for n in (0.8, 0.5, 800, 3, 0.1))
    arguments = (weights, start(1), cache, condition, *numbers, np.bool_(True))
    step = functools.partial(cached_step.__wrapped__, channels=CONFIG.in_channels)
    jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
    (jaxpr,) = [eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.params.get("name") == "predict_cached"]
    (call,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    inside = sorted(str(branch).count("dot_general[") for branch in call.params["branches"])
    outside = sum(str(eqn).count("dot_general[") for eqn in jaxpr.eqns if eqn is not call)
    whole = str(denoise_step.trace(*arguments[:2], condition, *[np.float32(1)] * 4, channels=4).jaxpr).count(
        "dot_general["
    )
    assert inside[0] == 0
    assert inside[1] + outside == whole
    assert inside[1] > outside


# ---- whole edits, by the bundled model ----

PICTURE = Image.fromarray(
    np.kron(np.random.default_rng(0).integers(0, 255, (8, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
)


@pytest.fixture(scope="module")
def demo():
    return joyjax.load(dtype="float32")


def edit(pipeline, **options):
    return joyjax.edit(pipeline, PICTURE, "make the red circle blue", **{"steps": 6, **options})


@pytest.fixture(scope="module")
def exact(demo):
    return edit(demo)


def test_the_exact_path_is_not_touched(demo, exact, monkeypatch):
    before = predict._cache_size()
    monkeypatch.setattr(predictor, "predict_cached", lambda *_, **__: pytest.fail("not asked for"))
    again = edit(demo, guidance_until=1.0, cache=None)
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(exact.image))
    assert predict._cache_size() == before
    assert (exact.computed_steps, exact.settings["cache"], exact.settings["guidance_until"]) == (6, None, 1.0)


def test_an_edit_with_a_cache(demo, exact):
    none = edit(demo, cache=0.0)
    assert none.computed_steps == 6
    assert np.abs(np.asarray(none.image).astype(int) - np.asarray(exact.image)).max() <= 1
    edit(demo, cache="first-block:0.1")
    before, counts = predict_cached._cache_size(), []
    for cache in (0.05, "first-block:0.3", 0.6, 1e6):
        result = edit(demo, cache=cache)
        counts.append(result.computed_steps)
        assert result.settings["cache"].startswith("first-block:" if isinstance(cache, str) else "taylor:")
    assert predict_cached._cache_size() == before  # the threshold is a number to the program
    assert counts == sorted(counts, reverse=True)
    assert 6 > counts[1]
    assert counts[-1] == 2


@pytest.mark.parametrize(
    ("rule", "written"),
    [
        (CacheRule(0.1), "taylor:0.1"),
        (CacheRule(1e6), "taylor:1e+06"),
        (CacheRule(0.0, "first-block"), "first-block:0"),
        (CacheRule(0.1234567), "taylor:0.1234567"),
    ],
)
def test_a_rule_is_written_as_it_is_read(rule, written, demo):
    """All of its digits, since a recipe must make the same picture again."""
    assert str(rule) == written
    assert check_request(demo, PICTURE, "make it red", cache=written).cache == rule


def test_the_numbers_of_an_edit_do_not_stay_for_the_next(demo):
    twice = [edit(demo, cache="taylor:1e6") for _ in range(2)]
    np.testing.assert_array_equal(*(np.asarray(result.image) for result in twice))
    assert [result.computed_steps for result in twice] == [2, 2]


def test_guidance_in_the_first_steps_alone(demo, error):
    """Steps after it are those of an edit without guidance."""
    options = {"guidance_scale": 3.0, "steps": 4}
    passes, latents = [], {}

    def keep(name):
        return lambda event: latents.setdefault(name, []).append(np.asarray(event.latents))

    whole = edit(demo, callback=keep("whole"), **options)
    half = edit(demo, callback=keep("half"), guidance_until=0.5, **options)
    np.testing.assert_array_equal(latents["half"][:2], latents["whole"][:2])
    assert np.abs(latents["half"][3] - latents["whole"][3]).max() > 1e-3
    assert (half.settings["guidance_until"], half.computed_steps, whole.computed_steps) == (0.5, 4, 4)

    # the third step by hand: what an edit without guidance would do from there
    def spy(transformer, latents, time, condition):
        passes.append(condition.txt.shape[0])
        if len(passes) == 3:
            given["condition"] = jax.tree.map(jnp.copy, condition)
        return predict(transformer, latents, time, condition)

    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "predict", spy)
        edit(demo, guidance_until=0.5, **options)
        edit(demo, guidance_scale=1.0, steps=4, callback=lambda event: None)
    assert passes == [2, 2, 1, 1, 1, 1, 1, 1]
    txt = given["condition"].txt[0, : int(given["condition"].txt_lengths[0])]
    request = check_request(demo, PICTURE, "make the red circle blue", guidance_scale=1.0, **REST)
    alone = Stages(demo, request).txt
    assert error(txt, np.asarray(alone)[0, : len(txt)]) < 1e-6  # the prompt's row, not the other's


REST = dict.fromkeys(("negative_prompt", "steps", "height", "width", "base_size", "noise"))
REST |= {"seed": 0, "exact_size": False}


def test_both_together(demo):
    result = edit(demo, guidance_scale=3.0, steps=8, guidance_until=0.5, cache=1e6)
    assert result.computed_steps == 3  # the first of each kind, and the last
