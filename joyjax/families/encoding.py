"""The encoding stages that families of pictures share: prompts, references, and the condition of both.

Such a family's own plan has `text`, the `pictures`' sizes and a `geometry`; its own arrays have `text`, `vision`, the
`pictures`' pixels and `positions`. `vision` is None where the text encoder sees no pictures.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from joyjax.families.family import Arrays, Events, Lengths, Networks
from joyjax.families.pictures import of_rows
from joyjax.layers.condition import Condition
from joyjax.models.autoencoder.pictures import encode_picture
from joyjax.models.autoencoder.stages import join_tokens
from joyjax.models.text_encoding import encode_prompt
from joyjax.sharding.place import replicate


def padded_positions(positions: Int[np.ndarray, "I 3"], lengths: Lengths) -> Int[np.ndarray, "B J 3"]:
    """Return positions of the target's tokens and of the references', each padded; equal in all passes."""
    (target, padded), (references, more) = lengths.target, lengths.references
    found = np.zeros((lengths.passes, padded + more, 3), np.int32)
    found[:, :target] = positions[:target]
    found[:, padded : padded + references] = positions[target:]
    return found


def encode_group(
    networks: Networks, group: Sequence[Arrays], events: Events
) -> tuple[list[Float[Array, "B J C"]], list[Float[Array, "b R P"]]]:
    """Encode the prompts of a group, then its references."""
    with events.stage("prompt"):
        texts = [jax.block_until_ready(encode_text(networks, arrays)) for arrays in group]
    with events.stage("references"):
        references = [jax.block_until_ready(encode_references(networks, arrays)) for arrays in group]
    return texts, references


def encode_text(networks: Networks, arrays: Arrays) -> Float[Array, "B J C"]:
    """Return the hidden states of both prompts, or without guidance of the one."""
    own = arrays.own
    first = np.array(arrays.plan.own.text.first, np.int32)
    with networks.use("text_encoder") as encoder:
        inputs = replicate((own.text, own.vision, first), networks.mesh)
        return encode_prompt(encoder, *inputs, length=arrays.plan.own.text.kept)


def encode_references(networks: Networks, arrays: Arrays) -> Float[Array, "b R P"]:
    """Return the concatenated latent tokens of all references, padded."""
    plan, own = arrays.plan, arrays.own
    if not own.pictures:
        return replicate(np.zeros((1, 0, plan.latents[1]), np.float32), networks.mesh)
    mode = plan.request.vae_encode
    with networks.use("vae") as vae:
        tokens = [encode_picture(vae, pixels, plan.own.geometry, mode, networks.mesh) for pixels in own.pictures]
    size = plan.lengths.references[1]
    if size == tokens[0].shape[1]:
        return tokens[0]
    return join_tokens(tokens, tuple(map(plan.own.geometry.tokens, plan.own.pictures)), size=size)


def assemble(
    arrays: Arrays, txt: Float[Array, "B J C"], references: Float[Array, "b R P"], txt_start: int | None = None
) -> Condition:
    """Assemble the condition of the denoising steps; every pass of a request has the same references."""
    plan, rows = arrays.plan, txt.shape[0]
    return Condition(
        txt=txt,
        txt_lengths=of_rows(plan.own.text.lengths, rows),
        references=jnp.tile(references, (rows, 1, 1)),
        positions=jax.device_put(arrays.own.positions),
        target_lengths=of_rows(plan.lengths.target[0], rows),
        reference_lengths=of_rows(plan.lengths.references[0], rows),
        txt_start=None if txt_start is None else of_rows(txt_start, rows),
    )
