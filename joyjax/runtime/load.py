"""Loading a model: its family, its parts, and its networks on the devices."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import NoReturn

from jax.sharding import Mesh

from joyjax import dtypes
from joyjax.convert import checkpoint, manifest, stream
from joyjax.convert.generation_defaults import GenerationDefaults
from joyjax.convert.safetensors import Tensors
from joyjax.convert.source.model import model_folder
from joyjax.convert.stream import Progress
from joyjax.errors import JoyJaxError, RequestError
from joyjax.families.family import Family, Parts
from joyjax.families.registry import family_in
from joyjax.families.request import Request
from joyjax.layers.weights import Weights, count_parameters
from joyjax.names import checks_names
from joyjax.options import EXACT
from joyjax.provenance.fingerprint import fingerprint
from joyjax.runtime.domains import Domain, domain_of
from joyjax.runtime.kernel_choice import KernelChooser
from joyjax.runtime.storage import AS_STORED, check_form, check_options, loaded_form
from joyjax.sharding.attention import share_out
from joyjax.sharding.devices import devices
from joyjax.sharding.mesh import check_mesh


@dataclasses.dataclass(frozen=True, repr=False)
class Pipeline:
    """A loaded model. `weights` are its networks by folder name, `generation_defaults` those of the checkpoint.

    `fingerprint` is that of the checkpoint when it was read; empty if there was none. `kernels` chooses the kernels of
    a step; None: XLA's own forms.
    """

    family: Family
    parts: Parts
    weights: Mapping[str, Weights]
    dtype: str
    mesh: Mesh | None
    generation_defaults: GenerationDefaults
    source: str
    linear: str = "exact"
    fingerprint: str = ""
    kernels: KernelChooser | None = None

    @property
    def base_size(self) -> int:
        """The default of the option `base_size`; 0 for a family without it."""
        return self.generation_defaults.base_size or self.family.defaults.get("base_size", 0)

    @property
    def domain(self) -> Domain | None:
        """The domain of a demo model; None for others."""
        return domain_of(self.generation_defaults.domain)

    @property
    def device_kind(self) -> str:
        """JAX's name of the kind of device that it runs on."""
        device = devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device.device_kind

    def advice(self, request: Request) -> list[str]:
        """Return notes on a request outside the domain."""
        return [] if self.domain is None else self.domain.advice(request.prompt, request.pictures)

    def __repr__(self) -> str:
        """Return a one-line description of the model and how it is loaded."""
        parameters = sum(count_parameters(weights.state) for weights in self.weights.values())
        mesh = None if self.mesh is None else ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return (
            f"<joyjax.Pipeline {self.family.name} ({self.family.class_names[0]}), {parameters:,} parameters, "
            f"{self.dtype}, linear {self.linear}, mesh {mesh}, from {self.source}>"
        )

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raise an error: unlike a pipeline of Diffusers, this one is not callable."""
        raise RequestError("a pipeline is not called; write joyjax.edit(pipeline, image, prompt)")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raise an error on pickling or deep copies: weights are on devices, and two copies may not fit."""
        raise JoyJaxError(
            f"a pipeline cannot be pickled or copied; load it in each process, with joyjax.load({self.source!r})"
        )

    def __copy__(self) -> "Pipeline":
        """Return itself: nothing in it changes."""
        return self


@functools.cache
def _first_process() -> int:
    """Return the id of the process that called this first, in which JAX's threads run."""
    return os.getpid()


def check_process() -> None:
    """Raise JoyJaxError in a process that was forked after a model was loaded, where JAX would deadlock.

    A fork copies the memory of a process, but not the threads that JAX waits for.
    """
    if os.getpid() != _first_process():
        raise JoyJaxError(
            f"process {os.getpid()} was forked from process {_first_process()} after a model was loaded there, and JAX "
            'does not survive a fork; start processes with multiprocessing.get_context("spawn") and load the model in '
            "each"
        )


@checks_names
def load(
    model: str | os.PathLike | None = None,
    *,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    quantize: str | None = None,
    linear: str = AS_STORED,
    kernels: str = "auto",
    progress: Progress | None = None,
) -> Pipeline:
    """Load a Diffusers folder, one that `joyjax convert` wrote, or a hub id; without `model`, the bundled demo.

    `dtype` is that of parameters and matrix products, "bfloat16" or "float32". `mesh` places the networks on several
    devices; None uses one. `quantize="float8"` quantizes the linear maps of the transformer's blocks while they are
    read; this approximation halves their memory (docs/speed.md has the error). None keeps the form in the folder, which
    may be one of `joyjax convert --quantize float8`; "exact" refuses such a folder. `linear` is the older name of
    `quantize`. `kernels`: "auto" measures the fused GPU kernels of the transformer once on each GPU, at the shapes of
    an edit, and runs those that are right and faster than XLA's own; "xla" runs none, "pallas" all (docs/kernels.md).
    `progress` is called with the bytes read so far and the total.

    Raises:
        CheckpointError: if the folder is not a complete checkpoint of a known family; its subclass ConfigError for a
            configuration value that joyjax does not implement.
        RequestError: for an unknown dtype, a form that the family does not have, "exact" for a quantized folder, or
            "pallas" on a device that cannot run the kernels.
        JoyJaxError: for an unsupported device, or in a process that was forked after another `load`.
        MeshError: for a mesh that does not fit.
    """
    check_process()
    param_dtype = dtypes.by_name(dtype)
    if mesh is not None:
        mesh = check_mesh(mesh)
    form = check_options(quantize, linear)
    folder = model_folder(model)
    family = family_in(folder)
    configs = {component.folder: component.read_config(folder) for component in family.components}
    device, option = mesh.devices.flat[0] if mesh else devices()[0], "linear" if quantize is None else "quantize"
    check_form(form, folder, family, configs, device, option)
    chooser = KernelChooser.of(kernels, device, dtype, mesh)
    parts = family.read(folder, configs)
    if mesh is not None:
        share_out(dict(mesh.shape), configs[family.denoiser].num_attention_heads)

    # All components are planned, and thereby checked, before the first weight is read.
    plans: dict[str, stream.ReadPlan | checkpoint.ReadPlan] = {}
    defaults = GenerationDefaults.read(folder)
    converted, storage = manifest.is_converted(folder), None if form == EXACT else form
    for component in family.components:
        config = configs[component.folder]
        if converted:
            plans[component.folder] = checkpoint.plan(folder, component, config, param_dtype, storage)
        else:
            tensors = Tensors.open(folder / component.folder)
            plans[component.folder] = stream.plan(component, config, tensors, param_dtype, storage)
    total, before = sum(plan.nbytes for plan in plans.values()), 0
    weights = {}
    for name, plan in plans.items():
        advance = None if progress is None else _advance(progress, before, total)
        weights[name] = plan.fill(mesh, advance)
        before += plan.nbytes
    held = loaded_form(folder, form)
    return Pipeline(family, parts, weights, dtype, mesh, defaults, str(folder), held, fingerprint(folder), chooser)


def _advance(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)
