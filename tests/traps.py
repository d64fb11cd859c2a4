"""Typical mistakes in an implementation of this model, each planted by patching joyjax.

`tests/parity/test_traps.py` runs an edit with each of them and asserts that the tests would notice. A trap is a
function that patches; its decorator describes the mistake and names the stage of the edit at which it is measured.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from PIL import Image

from joyjax.convert import joyimage as joyimage_keys
from joyjax.convert import wan_vae as wan_vae_keys
from joyjax.convert.rules import Transform
from joyjax.families import joyimage, joyimage_buckets, joyimage_prompt
from joyjax.families import joyimage_stages as family
from joyjax.kernels import modulate, qk_norm_rope
from joyjax.layers import condition, decoder, double_stream
from joyjax.layers.conv import Conv
from joyjax.layers.norm import ChannelNorm, rms_norm
from joyjax.layers.rope import rotate_half_split, rotation_by_blocks
from joyjax.media import framing
from joyjax.models import joyimage as transformer
from joyjax.models import qwen3_vl_vision
from joyjax.models.autoencoder import stages, wan
from joyjax.models.autoencoder.wan import ResBlock, Upsample, WanVAE
from joyjax.models.joyimage import JoyImageStream, JoyImageTransformer
from joyjax.models.qwen3_vl import LanguageModel, TextConfig
from joyjax.models.qwen3_vl_vision import VisionBlock, gelu
from joyjax.processors import qwen_vl, text, vision
from joyjax.sampling import euler
from joyjax.sampling import guided_step as steps
from joyjax.sampling.guidance import Guidance


@dataclasses.dataclass(frozen=True)
class Patch:
    """Replaces attributes until the test ends."""

    monkeypatch: pytest.MonkeyPatch

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.monkeypatch.setattr(owner, name, value, raising=False)

    def around(self, owner: Any, name: str, wrong: Callable) -> None:
        """Replace a function by `wrong`, which gets the original as its first argument."""
        right = getattr(owner, name)
        self.set(owner, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))


@dataclasses.dataclass(frozen=True)
class Trap:
    """A mistake. `given` patches both sides of the comparison; `reload`: the checkpoint is read with the mistake."""

    part: str
    mistake: str
    stage: str
    patch: Callable[[Patch], None]
    given: Callable[[Patch], None] | None = None
    reload: bool = False


TRAPS: list[Trap] = []


def entering(traps: list[Trap]) -> Callable[..., Callable[[Callable], Callable]]:
    """Return the decorator that enters functions into a table."""

    def trap(part: str, mistake: str, stage: str, **options: Any) -> Callable[[Callable], Callable]:
        def enter(patch: Callable) -> Callable:
            traps.append(Trap(part, mistake, stage, patch, **options))
            return patch

        return enter

    return trap


trap = entering(TRAPS)


# The transformer


@trap("transformer", "RoPE's theta 256, the default of the class, for 10000", "velocity")
def theta_of_the_class(patch):
    patch.around(
        condition, "rotation_by_blocks", lambda right, positions, channels, theta: right(positions, channels, 256.0)
    )


def around_norm_rope(patch, wrong):
    patch.around(qk_norm_rope, "norm_rope", wrong)
    patch.around(double_stream, "norm_rope", wrong)


@trap("transformer", "RoPE pairs channels i and i + H/2, for 2i and 2i + 1", "velocity")
def half_split(patch):
    def wrong(right, x, scale, rotation, **eps):
        y = right(x, scale, None, **eps)
        return y if rotation is None else rotate_half_split(y, rotation)

    around_norm_rope(patch, wrong)


@trap("transformer", "queries and keys normalised after RoPE, for before", "velocity")
def norm_after_rope(patch):
    def wrong(right, x, scale, rotation, **eps):
        rotated = right(x, jnp.ones_like(scale), rotation, **eps)  # rotating keeps the norm, but not the scale
        return right(rotated, scale, None, **eps)

    around_norm_rope(patch, wrong)


@trap("transformer", "RoPE's axes are column, row, item, for item, row, column", "velocity")
def column_first(patch):
    patch.around(condition, "rotation_by_blocks", lambda right, positions, *how: right(positions[..., ::-1], *how))


@trap("transformer", "items numbered as they come, the target last, for the target first", "velocity")
def target_last(patch):
    patch.around(family, "item_positions", lambda right, item, *size: right((item - 1) % 3, *size))


@trap("transformer", "every item at time 0, for one time each", "velocity")
def items_not_numbered(patch):
    patch.around(family, "item_positions", lambda right, item, *size: right(0, *size))


def rotate_text(patch, offset=0):
    """Rotate text, as `rope_type` mrope does; with an offset, from a wrong position."""

    def wrong(right, self, latents, condition, mesh):
        start = jnp.max(condition.positions, axis=(1, 2)) + 1 + offset
        positions = start[:, None, None] + jnp.arange(condition.txt.shape[1], dtype=start.dtype)[:, None]
        rotation = rotation_by_blocks(jnp.tile(positions, 3), self.config.rope_dim_list, self.config.theta)
        layout, tokens = right(self, latents, condition, mesh)
        return dataclasses.replace(layout, txt_rotation=rotation), tokens

    patch.around(JoyImageTransformer, "_lay_out", wrong)


@trap("transformer", "text rotated, though rope_type is rope", "velocity")
def text_rotated(patch):
    rotate_text(patch)


@trap("transformer", "mrope: text starts at the largest image index, for one beyond", "velocity", given=rotate_text)
def mrope_starts_early(patch):
    rotate_text(patch, offset=-1)


@trap("transformer", "padding of the shorter prompt attended to", "velocity")
def padding_attended_to(patch):
    def wrong(right, *inputs):
        layout, tokens = right(*inputs)
        return dataclasses.replace(layout, txt_lengths=None), tokens

    patch.around(JoyImageTransformer, "_lay_out", wrong)


@trap("transformer", "time embedding [sin, cos], for [cos, sin]", "velocity")
def sine_first(patch):
    patch.around(
        transformer, "timestep_embedding", lambda right, time, size: jnp.roll(right(time, size), size // 2, axis=-1)
    )


@trap("transformer", "frequencies of the time over half − 1, for half", "velocity")
def frequencies_over_half_less_one(patch):
    def wrong(right, time, size):
        angle = time[:, None] * np.float32(10000) ** -np.linspace(0, 1, size // 2, dtype=np.float32)
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)

    patch.around(transformer, "timestep_embedding", wrong)


@trap("transformer", "no SiLU before the time projection", "velocity")
def no_silu(patch):
    def wrong(right, self, time):
        embedding = transformer.timestep_embedding(time, transformer.TIME_CHANNELS)
        return self.time_out(self.time_hidden(nnx.silu(self.time_in(embedding))))

    patch.around(JoyImageTransformer, "_embed_time", wrong)


def around_modulation(patch, *order):
    patch.around(JoyImageStream, "modulation", lambda right, *inputs: right(*inputs)[:, :, np.array(order)])


@trap("transformer", "modulation read as scale, shift, gate, for shift, scale, gate", "velocity")
def scale_first(patch):
    around_modulation(patch, 1, 0, 2, 4, 3, 5)


@trap("transformer", "modulation of the MLP before that of the attention", "velocity")
def mlp_modulation_first(patch):
    around_modulation(patch, 3, 4, 5, 0, 1, 2)


@trap("transformer", "norm times scale, for 1 + scale", "velocity")
def scale_without_one(patch):
    patch.around(modulate, "_modulated", lambda right, x, scale, shift, eps: right(x, scale - 1, shift, eps))


@trap("transformer", "head modulated, as in Flux, for a plain norm", "velocity")
def modulated_head(patch):
    seen = []

    def keep(right, *inputs):
        seen.append(right(*inputs))
        return seen[-1]

    def wrong(right, x):
        shift, scale = seen[-1][:, None, 0], seen[-1][:, None, 1]
        return right(x) * (1 + scale) + shift

    patch.around(JoyImageTransformer, "_embed_time", keep)
    patch.around(transformer, "layer_norm", wrong)


@trap("transformer", "queries, keys and values side by side in each head, for apart", "velocity", reload=True)
def qkv_by_head(patch):
    def view(shape):
        return right.view(shape) if len(shape) < 4 else (shape[2], shape[1], shape[3], shape[0])  # time_proj: no heads

    def axes(shape):
        return right.axes(shape) if len(shape) < 4 else (3, 1, 0, 2)

    right = joyimage_keys.split_out
    patch.set(joyimage_keys, "split_out", dataclasses.replace(right, view=view, axes=axes))


@trap("transformer", "patches flattened channel last into img_in, for channel first", "velocity", reload=True)
def patches_in_channel_last(patch):
    def wrong(right, *size):  # our tokens are channel-last; the mistake is a kernel that is not permuted for them
        return dataclasses.replace(right(*size), view=lambda shape: (shape[1], shape[0]), axes=lambda shape: (1, 0))

    patch.around(joyimage_keys, "patch_in", wrong)


@trap("transformer", "patches unfolded channel first from proj_out, for channel last", "velocity")
def patches_out_channel_first(patch):
    def wrong(right, *inputs):
        return rearrange(right(*inputs), "b t (c q r) -> b t (q r c)", q=2, r=2)

    patch.around(JoyImageTransformer, "__call__", wrong)


@trap("transformer", "the MLPs' GELU exact, for tanh", "transformer MLP")
def mlp_gelu_exact(patch):
    patch.set(JoyImageStream, "mlp", lambda self, x: self.down(nnx.gelu(self.up(x), approximate=False)))


@trap("transformer", "the text embedding's GELU exact, for tanh", "text embedding")
def text_gelu_exact(patch):
    def wrong(self, txt):
        return self.txt_hidden(nnx.gelu(self.txt_in(txt), approximate=False))

    patch.set(JoyImageTransformer, "_embed_text", wrong)


# Guidance and schedule


@trap("guidance", "conditional + g·(conditional − unconditional), for unconditional + …", "latents")
def guided_from_conditional(patch):
    patch.around(steps, "guide", lambda right, v, scale, how: right(v, scale + 1, how))


@trap("guidance", "the two rows swapped", "latents")
def guidance_rows_swapped(patch):
    patch.around(steps, "guide", lambda right, v, scale, how: right(v[::-1], scale, how))


@trap("guidance", "norm not restored", "latents")
def norm_not_restored(patch):
    patch.set(steps, "guide", lambda v, scale, how: v[0] + scale[:, None, None] * (v[1] - v[0]))


@trap("guidance", "norm restored token by token, for latent pixel by latent pixel", "latents")
def norm_of_tokens(patch):
    patch.around(steps, "guide", lambda right, v, scale, how: right(v, scale, Guidance(v.shape[-1])))


@trap("schedule", "lowest sigma shifted once, for twice", "schedule")
def lowest_sigma_shifted_once(patch):
    def wrong(right, count, config, *_, **__):
        levels = np.linspace(1, 1 / config.num_train_timesteps, count)
        levels = config.shift * levels / (1 + (config.shift - 1) * levels)
        return np.append(levels, 0).astype(np.float32)

    patch.around(euler, "sigmas", wrong)


@trap("schedule", "timestep sigma, for 1000·sigma", "latents")
def time_is_sigma(patch):
    patch.set(euler, "timesteps", lambda levels, config: levels)


# The autoencoder


@trap("autoencoder", "norm with an epsilon beside the mean square, for an L2 norm", "norm of small numbers")
def norm_with_epsilon(patch):
    patch.set(ChannelNorm, "__call__", lambda self, x: rms_norm(x, self.scale[...], 1e-6).astype(x.dtype))


@trap("autoencoder", "downsampling pads top and left, for bottom and right", "reference latents", reload=True)
def padded_top_left(patch):
    padding = ((1, 0), (1, 0))
    patch.set(wan, "downsample", lambda width, **how: Conv(width, width, 3, stride=2, padding=padding, **how))


@trap("autoencoder", "first temporal slice of the causal kernels, for the last", "reference latents", reload=True)
def first_temporal_slice(patch):
    class First(Transform):
        def forward(self, x, shape):
            return super().forward(np.roll(x, -1, axis=2), shape)

    patch.around(wan_vae_keys, "last_frame", lambda right, frames: First(**vars(right(frames))))


@trap("autoencoder", "shortcut of the normalised input, for the raw one", "reference latents")
def shortcut_normalised(patch):
    def wrong(right, self, x, *region):
        shortcut = self.shortcut or (lambda x: x)
        return right(self, x, *region) - shortcut(x) + shortcut(self.norm1(x))

    patch.around(ResBlock, "__call__", wrong)


@trap("autoencoder", "upsampling bilinear, for nearest", "decoded")
def bilinear_upsampling(patch):
    def wrong(right, self, x, *region):
        b, h, w, c = x.shape
        return self.conv(jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear"), *region)

    patch.around(Upsample, "__call__", wrong)


def statistics(vae):
    return (jnp.array(numbers, jnp.float32) for numbers in (vae.config.latents_mean, vae.config.latents_std))


@trap("autoencoder", "reference latents not normalised", "reference latents")
def latents_not_normalised(patch):
    def wrong(right, self, pixels, *mode):
        mean, std = statistics(self)
        return right(self, pixels, *mode) * std + mean

    patch.around(WanVAE, "encode", wrong)


@trap("autoencoder", "latents decoded without undoing the normalisation", "decoded")
def latents_not_denormalised(patch):
    def wrong(right, self, latents, *mode):
        mean, std = statistics(self)
        return right(self, (latents - mean) / std, *mode)

    patch.around(WanVAE, "decode", wrong)


@trap("autoencoder", "a sample of the posterior, for its mode", "reference latents")
def posterior_sampled(patch):
    def wrong(right, self, pixels, *mode):
        _, log_variance = jnp.split(self.quant(self.encoder(pixels)), 2, axis=-1)
        noise = jax.random.normal(jax.random.key(0), log_variance.shape, log_variance.dtype)
        _, std = statistics(self)
        return right(self, pixels, *mode) + jnp.exp(log_variance / 2) * noise / std

    patch.around(WanVAE, "encode", wrong)


@trap("autoencoder", "pixels taken to [0, 1], for [-1, 1]", "reference latents")
def pixels_from_zero(patch):
    patch.around(WanVAE, "encode", lambda right, self, pixels, *mode: right(self, (pixels + 1) / 2, *mode))


@trap("autoencoder", "pixels cut off, for rounded", "picture")
def pixels_cut_off(patch):
    patch.set(stages.jnp, "round", jnp.floor)


# The text encoder


@trap("text encoder", "hidden states after the final norm, for before", "hidden states")
def after_the_final_norm(patch):
    def wrong(right, *inputs):
        states = right(*inputs)
        return rms_norm(states, jnp.ones(states.shape[-1], jnp.float32), 1e-6)

    patch.around(LanguageModel, "__call__", wrong)


@trap("text encoder", "RoPE pairs channels 2i and 2i + 1, for i and i + H/2", "hidden states")
def interleaved_pairs(patch):
    def wrong(right, x, rotation):
        rotated = right(jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1), rotation)
        return rearrange(rotated, "b l n (two h) -> b l n (h two)", two=2)

    patch.around(decoder, "rotate_half_split", wrong)


@trap("text encoder", "frequencies dealt to the three axes in chunks, for in turn", "hidden states")
def mrope_in_chunks(patch):
    patch.set(
        TextConfig, "axis_of_frequency", property(lambda self: tuple(np.repeat((0, 1, 2), self.mrope_section).tolist()))
    )


@trap("text encoder", "key head j for query heads j, j + K, …, for neighbours", "hidden states")
def key_heads_by_turns(patch):
    def wrong(right, query, key, value, **how):
        turns = (1, 1, query.shape[2] // key.shape[2], 1)
        return right(query, jnp.tile(key, turns), jnp.tile(value, turns), **how)

    patch.around(decoder, "partitioned_attention", wrong)


@trap("text encoder", "attention in both directions, for causal", "hidden states")
def text_sees_ahead(patch):
    patch.around(decoder, "partitioned_attention", lambda right, *heads, causal: right(*heads))


@trap("text encoder", "no DeepStack", "hidden states")
def no_deepstack(patch):
    patch.around(LanguageModel, "__call__", lambda right, self, inputs, features, _: right(self, inputs, features))


@trap("text encoder", "DeepStack one layer late", "hidden states")
def deepstack_late(patch):
    def wrong(right, self, inputs, features, deepstack):
        return right(self, inputs, features, (jnp.zeros_like(features), *deepstack))

    patch.around(LanguageModel, "__call__", wrong)


@trap("text encoder", "text after a picture goes on at p + count, for p + max(rows, columns)", "hidden states")
def text_after_every_patch(patch):
    def wrong(right, ids, image_token, grids):
        positions = right(ids, image_token, grids)
        late = np.arange(len(ids), dtype=np.int32) - positions[:, 0]
        for start, (rows, columns) in zip(text._image_starts(ids, image_token, grids), grids, strict=True):
            late[start : start + rows * columns] = late[start]
        return positions + late[:, None]

    patch.around(qwen_vl, "multimodal_positions", wrong)


# The vision tower


@trap("vision tower", "position table stretched with align_corners false, for true", "vision tokens")
def corners_not_aligned(patch):
    def wrong(right, rows, columns, config):
        positions, size = right(rows, columns, config)[0], config.grid_size
        source = np.clip((positions + 0.5) * size / np.array([rows, columns]) - 0.5, 0, size - 1)
        low = np.floor(source).astype(np.int32)
        corners = np.stack([low, np.minimum(low + 1, size - 1)])
        shares = np.stack([1 - (source - low), source - low]).astype(np.float32)
        taps = corners[:, None, :, 0] * size + corners[None, :, :, 1]
        weights = shares[:, None, :, 0] * shares[None, :, :, 1]
        return positions, taps.reshape(4, -1).T, weights.reshape(4, -1).T

    patch.around(qwen_vl, "patch_positions", wrong)


@trap("vision tower", "RoPE's axes are column, row, for row, column", "vision tokens")
def columns_before_rows(patch):
    patch.around(
        qwen3_vl_vision, "rotation_by_blocks", lambda right, positions, *how: right(positions[..., ::-1], *how)
    )


def around_patches(patch, wrong):
    def changed(right, *inputs):
        patches, grid = right(*inputs)
        return wrong(patches, *grid), grid

    patch.around(qwen_vl, "vision_patches", changed)


@trap("vision tower", "patches row by row, for block by block", "vision patches")
def patches_row_by_row(patch):
    order = "(row column m k) p -> (row m column k) p"
    around_patches(patch, lambda patches, rows, columns: rearrange(patches, order, row=rows // 2, m=2, k=2))


@trap("vision tower", "numbers of a patch frame by frame, for channel by channel", "vision patches")
def frame_first(patch):
    around_patches(patch, lambda patches, rows, columns: rearrange(patches, "n (c t p) -> n (t c p)", c=3, t=2))


@trap("vision tower", "second frame of a patch empty, for the first again", "vision patches")
def one_frame(patch):
    empty = np.tile(np.repeat(np.float32([1, 0]), 256), 3)
    around_patches(patch, lambda patches, rows, columns: patches * empty)


@trap("vision tower", "pictures attend to each other", "vision tokens")
def pictures_see_each_other(patch):
    def wrong(right, *heads, lengths):
        return right(*(x.reshape(1, -1, *x.shape[2:]) for x in heads)).reshape(heads[0].shape)

    patch.around(qwen3_vl_vision, "partitioned_attention", wrong)


@trap("vision tower", "the MLPs' GELU exact, for tanh", "vision MLP")
def vision_gelu_exact(patch):
    patch.set(VisionBlock, "mlp", lambda self, x: self.down(gelu(self.up(x), approximate=False)))


@trap("vision tower", "the mergers' GELU tanh, for exact", "vision merger")
def merger_gelu_tanh(patch):
    patch.around(qwen3_vl_vision, "gelu", lambda right, x, approximate: right(x, approximate=True))


# The prompt


@trap("prompt", "template without the backslash and the n", "velocity")
def template_corrected(patch):
    patch.set(joyimage_prompt, "SYSTEM", joyimage_prompt.SYSTEM.replace("\\n", ""))


@trap("prompt", "33 tokens dropped, for 34", "velocity")
def drop_33(patch):
    patch.set(joyimage_prompt, "DROPPED", 33)


@trap("prompt", "a line break between picture and prompt", "velocity")
def line_break_after_picture(patch):
    patch.around(
        joyimage_prompt, "prompt_tokens", lambda right, words, prompt, counts: right(words, "\n" + prompt, counts)
    )


def acting_tokens(tokenizer, prompt):
    """Return the ids of a text whose control tokens act."""
    tokenizer.encode_special_tokens = False
    try:
        return tokenizer.encode(prompt, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = True


@trap("prompt", "control tokens in a prompt act", "token ids")
def control_tokens_act(patch):
    patch.set(joyimage_prompt, "plain_tokens", acting_tokens)


def few_states(patch):
    patch.set(joyimage_prompt, "LONGEST_PROMPT", 24)


@trap("prompt", "the first 4096 hidden states kept, for the last", "velocity", given=few_states)
def start_of_a_prompt_kept(patch):
    def wrong(right, *inputs, **how):
        plan = right(*inputs, **how)
        return dataclasses.replace(plan, first=(joyimage_prompt.DROPPED,) * len(plan.first))

    patch.around(family, "plan_text", wrong)


# Pictures


def resampled(patch, resample):
    patch.around(Image.Image, "resize", lambda right, self, size, _: right(self, size, resample))


@trap("pictures", "fitted bicubically, for bilinearly", "pixels")
def fitted_bicubically(patch):
    resampled(patch, Image.Resampling.BICUBIC)


@trap("pictures", "enlarged bilinearly for the vision tower, for bicubically", "vision patches")
def enlarged_bilinearly(patch):
    resampled(patch, Image.Resampling.BILINEAR)


@trap("pictures", "scaled size rounded, for rounded up", "pixels")
def scaled_size_rounded(patch):
    patch.set(framing, "math", SimpleNamespace(ceil=round))


@trap("pictures", "odd rest of a crop cut off at the top and left, for bottom and right", "pixels")
def crop_to_the_right(patch):
    def wrong(right, self, box):
        left, top, width, height = *box[:2], box[2] - box[0], box[3] - box[1]
        left, top = left + (self.width - width) % 2, top + (self.height - height) % 2
        return right(self, (left, top, left + width, top + height))

    patch.around(Image.Image, "crop", wrong)


@trap("pictures", "of equally near buckets the last, for the first in Diffusers' order", "buckets")
def last_of_equal_buckets(patch):
    patch.around(joyimage_buckets, "buckets", lambda right, base_size: right(base_size)[::-1])


@trap("pictures", "nearest bucket by the ratio's logarithm, for its plain difference", "buckets")
def ratio_by_logarithm(patch):
    def wrong(right, height, width, base_size):
        return min(
            joyimage_buckets.buckets(base_size), key=lambda size: abs(math.log(size[0] / size[1] * width / height))
        )

    patch.around(joyimage_buckets, "nearest_bucket", wrong)


@trap("pictures", "halves of 32 rounded up, for to even", "vision sizes")
def halves_up(patch):
    patch.set(vision, "round", lambda x: math.floor(x + 0.5))


# Differences of Edit-Plus


@trap("Edit-Plus", "negative prompt empty, for one space", "velocity")
def negative_prompt_of_edit(patch):
    defaults = {**joyimage.EDIT_PLUS.defaults, "negative_prompt": ""}
    patch.set(joyimage, "EDIT_PLUS", dataclasses.replace(joyimage.EDIT_PLUS, defaults=defaults))


@trap("Edit-Plus", "references fitted to the result's size, for each to its own bucket", "velocity")
def references_of_one_size(patch):
    patch.around(family, "plan_pictures", lambda right, request, size, own_sizes: right(request, size, False))


@trap("Edit-Plus", "size from the first reference, for the last", "size")
def size_of_the_first(patch):
    def wrong(right, request):
        return right(dataclasses.replace(request, pictures=request.pictures[:1]))

    patch.around(family, "target_size", wrong)
