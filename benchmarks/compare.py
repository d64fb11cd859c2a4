"""Compares joyjax with Diffusers stage by stage, on the same checkpoint, picture and noise.

    python benchmarks/compare.py MODEL --image FILE --prompt "make the sky red" [--dtype float32|bfloat16] [--steps N]

Diffusers and joyjax run one after the other, each in its own process, which stores its stages, so they never share
memory. Then a table and a verdict are printed; the exit status is the verdict. Needs the extra `joyjax[reference]`. On
a GPU, Diffusers uses it; joyjax uses JAX's default device.

The reference samples its VAE posterior without a seed; both sides use its mode instead.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for stagewise.py

# Relative, for each stage: the largest difference in float32, the root-mean-square difference in bfloat16.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}
MEASURED = ("seconds to load", "seconds to edit", "peak host memory in GiB")
IMAGE_LIMITS = {"float32": ("largest difference", 2 / 255), "bfloat16": ("PSNR in dB, at least", 34.7)}


def run_diffusers(arguments: argparse.Namespace, noise: np.ndarray, out: Path) -> None:
    """Run the reference and store its stages."""
    import diffusers
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.joyimage import image_processor

    from joyjax.families.joyimage_buckets import buckets

    torch.set_grad_enabled(False)
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
    if arguments.base_size:
        image_processor.BUCKETS[1024] = list(buckets(arguments.base_size))
    started = time.perf_counter()
    pipeline = load_diffusers(Path(arguments.model), getattr(torch, arguments.dtype))
    if torch.cuda.is_available():
        pipeline.enable_model_cpu_offload()
    plus = type(pipeline).__name__ == "JoyImageEditPlusPipeline"
    stages: dict[str, np.ndarray] = {"seconds to load": np.array(time.perf_counter() - started)}

    def keep(name: str, tensor: "torch.Tensor") -> None:
        stages.setdefault(name, tensor.float().cpu().numpy())

    def text_hook(module, args, kwargs, output):
        n = sum(key.startswith("token ids") for key in stages)
        keep(f"token ids {n}", kwargs["input_ids"])
        if kwargs.get("pixel_values") is not None:
            keep("vision patches", kwargs["pixel_values"])

    def transformer_hook(module, args, kwargs, output):
        txt = kwargs["encoder_hidden_states"]
        velocity = output[0]
        if plus:
            mask = kwargs["encoder_hidden_states_mask"].bool()
            rows = list(zip(["negative", "prompt"] if len(txt) == 2 else ["prompt"], range(len(txt)), strict=True))
            for name, n in rows:
                keep(f"hidden states, {name}", txt[n : n + 1][:, mask[n]])
                tokens = velocity[n : n + 1, : noise.shape[1] * noise.shape[2] // 4]
                keep(f"first velocity, {name}", tokens.movedim(2, -1).reshape(1, tokens.shape[1], -1))
            patches = kwargs["hidden_states"][:1, noise.shape[1] * noise.shape[2] // 4 :]
            keep("reference latents", patches.movedim(2, -1).reshape(1, patches.shape[1], -1))
        else:
            name = "prompt" if "first velocity, prompt" not in stages else "negative"
            keep(f"hidden states, {name}", txt)
            keep(f"first velocity, {name}", patched(velocity[:, -1, :, 0]))
            if kwargs["hidden_states"].shape[1] > 1:
                keep("reference latents", patched(kwargs["hidden_states"][:, 0, :, 0]))

    def patched(x: "torch.Tensor") -> "torch.Tensor":
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * c)

    def step_hook(pipe, n, t, values):
        latents = values["latents"]
        if plus:
            tokens = latents[:, : noise.shape[1] * noise.shape[2] // 4].movedim(2, -1)
            stages[f"latents after step {n + 1}"] = tokens.reshape(1, tokens.shape[1], -1).float().cpu().numpy()
        else:
            stages[f"latents after step {n + 1}"] = patched(latents[:, -1, :, 0]).float().cpu().numpy()
        return values

    pipeline.text_encoder.register_forward_hook(text_hook, with_kwargs=True)
    pipeline.transformer.register_forward_hook(transformer_hook, with_kwargs=True)
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1)[:, :, None])
    pictures = [Image.open(path).convert("RGB") for path in arguments.image]
    started = time.perf_counter()
    result = pipeline(
        **({"images": pictures or None} if plus else {"image": pictures[0] if pictures else None}),
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        latents=latents if plus else latents[:, None],
        callback_on_step_end=step_hook,
    ).images[0]
    stages["seconds to edit"] = np.array(time.perf_counter() - started)
    stages["peak host memory in GiB"] = np.array(peak_memory())
    stages["image"] = np.asarray(result)
    np.savez(out, diffusers=diffusers.__version__, **stages)


def peak_memory() -> float:
    """Return the peak memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load_diffusers(folder: Path, dtype: object) -> object:
    """Load the pipeline part by part: as a whole it needs torchvision, for a video processor that is not used."""
    import diffusers
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, name, value):
            return type(value)

    index = json.loads((folder / "model_index.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    pipeline = getattr(diffusers, index["_class_name"])(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=diffusers.AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=dtype),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype),
        tokenizer=tokenizer,
        transformer=getattr(diffusers, index["transformer"][1]).from_pretrained(
            folder / "transformer", torch_dtype=dtype
        ),
        processor=WithoutVideo(image_processor=images, tokenizer=tokenizer, video_processor=object()),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_joyjax(arguments: argparse.Namespace, noise: np.ndarray | None, out: Path) -> None:
    """Run joyjax and store the same stages; without noise, only draw and store the noise."""
    import jax.numpy as jnp
    from stagewise import Stages

    import joyjax
    from joyjax.layers.patch import unpatchify
    from joyjax.media.image import open_picture
    from joyjax.runtime.request import check_request

    started = time.perf_counter()
    pipeline = joyjax.load(arguments.model, dtype=arguments.dtype)
    loaded = time.perf_counter() - started
    options = {
        "negative_prompt": arguments.negative_prompt,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "height": arguments.height,
        "width": arguments.width,
        "base_size": arguments.base_size,
        "noise": noise,
    }
    pictures = [open_picture(path) for path in arguments.image] or None  # None: text to image
    request = check_request(pipeline, pictures, arguments.prompt, seed=0, exact_size=False, **options)
    run = Stages(pipeline, request)
    plan, inputs = run.plan, run.arrays.own
    if noise is None:
        patch, factor = plan.own.geometry.patch, plan.own.geometry.factor
        tokens = jnp.asarray(run.noise[:, : plan.lengths.target[0]])
        drawn = np.asarray(unpatchify(tokens, patch, plan.size[2] // (factor * patch[1])))
        np.savez(out, noise=drawn, steps=request.steps, guided=request.guided)
        return

    stages: dict[str, np.ndarray] = {"seconds to load": np.array(loaded)}
    names = ["negative", "prompt"] if request.guided else ["prompt"]
    txt, kept = run.txt, plan.own.text.lengths
    lengths = np.add(plan.own.text.first, kept)
    for n, name in enumerate(names):
        stages[f"hidden states, {name}"] = np.asarray(txt.astype(jnp.float32))[n : n + 1, : kept[n]]
        order = 0 if name == "prompt" else 1  # the reference encodes the prompt first
        stages[f"token ids {order}"] = np.asarray(inputs.text.ids)[n : n + 1, : lengths[n]]
    if inputs.vision is not None:
        valid = [patches[:count] for patches, count in zip(inputs.vision.patches, inputs.vision.lengths, strict=True)]
        stages["vision patches"] = np.concatenate(valid)
        stages["reference latents"] = np.asarray(run.references)[:, : plan.lengths.references[0]]
    rows = jnp.tile(run.noise, (len(names), 1, 1))
    time_1 = jnp.full(len(names), 1000.0, jnp.float32)
    velocity = pipeline.weights["transformer"].module()(rows, time_1, run.condition)
    for n, name in enumerate(names):
        stages[f"first velocity, {name}"] = np.asarray(velocity)[n : n + 1, : plan.lengths.target[0]]

    def keep(event: joyjax.StepEvent) -> None:
        stages[f"latents after step {event.step}"] = np.asarray(event.latents)

    started = time.perf_counter()
    result = joyjax.edit(pipeline, pictures, arguments.prompt, callback=keep, **options)
    stages["seconds to edit"] = np.array(time.perf_counter() - started)
    stages["peak host memory in GiB"] = np.array(peak_memory())
    stages["image"] = np.asarray(result.image)
    np.savez(out, **stages)


def compare(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray], dtype: str) -> bool:
    """Print the table and the verdict."""
    limit, good = LIMITS[dtype], True
    print(f"{'stage':32} {'shape':>20} {'largest diff':>13} {'rms diff':>10}  (relative, {dtype})")
    for name, their in theirs.items():
        if name in ("image", "diffusers", *MEASURED):
            continue
        if name not in ours or ours[name].shape != their.shape:
            got = "nothing" if name not in ours else f"shape {ours[name].shape}"
            print(f"{name:32} {their.shape!s:>20}  joyjax has {got}  FAIL")
            good = False
            continue
        off = ours[name].astype(np.float64) - their
        largest = np.abs(off).max() / max(np.abs(their).max(), 1e-30)
        rms = np.sqrt((off**2).mean() / max((their.astype(np.float64) ** 2).mean(), 1e-30))
        exact = name.startswith("token ids") or (name == "vision patches" and dtype == "float32")
        ok = largest == 0 if exact else (largest if dtype == "float32" else rms) <= limit
        good &= bool(ok)
        print(f"{name:32} {their.shape!s:>20} {largest:13.2e} {rms:10.2e}  {'' if ok else 'FAIL'}")
    off = ours["image"].astype(np.float64) - theirs["image"]
    psnr = 10 * np.log10(255**2 / max((off**2).mean(), 1e-10))
    kind, bound = IMAGE_LIMITS[dtype]
    ok = psnr >= bound if dtype == "bfloat16" else np.abs(off).max() <= 255 * bound
    print(f"{'image':32} {off.shape!s:>20} {np.abs(off).max():9.0f}/255   PSNR {psnr:.1f} dB  {'' if ok else 'FAIL'}")
    for name in MEASURED:
        print(f"{name:32} Diffusers {float(theirs[name]):8.2f}   joyjax {float(ours[name]):8.2f}")
    print("(joyjax's seconds include compiling)")
    good &= bool(ok)
    unit = "largest difference" if dtype == "float32" else "root-mean-square difference"
    print(f"limits: {unit} {limit:g} at each stage; image: {kind} {bound:g}")
    print("VERDICT: the same model" if good else "VERDICT: NOT the same model")
    return good


def main() -> None:
    """Run both sides and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Diffusers folder")
    parser.add_argument("--image", action="append", default=[], help="reference picture; repeat for several")
    parser.add_argument("--prompt", default="make the sky red")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--dtype", choices=LIMITS, default="bfloat16")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--base-size", type=int, help="base size of the buckets, on both sides (default: 1024)")
    parser.add_argument("--keep", type=Path, help="folder for the stored stages (default: not kept)")
    parser.add_argument("--side", choices=["noise", "diffusers", "joyjax"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.side == "noise":
            return run_joyjax(arguments, None, arguments.folder / "noise.npz")
        drawn = np.load(arguments.folder / "noise.npz")
        arguments.steps = int(drawn["steps"])
        side = run_diffusers if arguments.side == "diffusers" else run_joyjax
        return side(arguments, drawn["noise"], arguments.folder / f"{arguments.side}.npz")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for side in ("noise", "diffusers", "joyjax"):
            command = [sys.executable, "-P", __file__, *sys.argv[1:], "--side", side, "--folder", str(folder)]
            if subprocess.run(command).returncode:
                sys.exit(f"the {side} side failed")
        stored = [dict(np.load(folder / f"{side}.npz")) for side in ("diffusers", "joyjax")]
    sys.exit(not compare(*stored, arguments.dtype))


if __name__ == "__main__":
    main()
