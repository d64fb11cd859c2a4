"""Reading the safetensors files of one component, tensor by tensor."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from joyjax.convert.rules import Shape
from joyjax.dtypes import STORED
from joyjax.errors import CheckpointError
from joyjax.inputs.files import read_json

# The names that Diffusers and Transformers give; a variant such as model.fp16.safetensors is not looked at.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
INDEX = ".index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

# The format's names and NumPy's. Parameters have one of dtypes.STORED; what is not read may be of any of these kinds.
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool"},
    **{f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What the header of `file` says of one tensor; the dtype under NumPy's name."""

    shape: Shape
    dtype: str
    file: Path

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Tensors:
    """The tensors of one component's folder. Opening it reads headers only, `read` one tensor."""

    def __init__(self, folder: Path):
        """Look into a component's folder: one safetensors file, or shards with an index.

        Raises:
            CheckpointError: if the folder or its weights are missing or unreadable, if they are pickled, or if index
                and shards do not agree.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is missing; it should hold {WEIGHTS[0]} or {WEIGHTS[1]}")
        found = [name for stem in WEIGHTS for name in (stem, stem + INDEX) if (folder / name).is_file()]
        if not found:
            raise CheckpointError(_why_none(folder))
        if len(found) > 1:
            raise CheckpointError(f"{folder} holds {' and '.join(found)}; which are its weights? Keep one of them")
        file = folder / found[0]
        self.folder = folder
        self.headers = _read_shards(file) if file.name.endswith(INDEX) else _read_header(file)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each tensor by name."""
        return {name: tensor.shape for name, tensor in self.headers.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return one tensor, or some rows of its first axis.

        Raises:
            CheckpointError: if the file has gone or changed since it was opened.
        """
        file = self.headers[name].file
        try:
            # Opened for each tensor, so that the pages of a tensor leave memory with it.
            with safe_open(file, framework="numpy") as opened:
                return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read: {error}") from None


def _read_header(file: Path) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():
                header = opened.get_slice(name)
                if (dtype := header.get_dtype()) not in DTYPES:
                    raise CheckpointError(f"{file}: tensor {name} is stored as {dtype}; expected {', '.join(STORED)}")
                tensors[name] = Tensor(tuple(header.get_shape()), DTYPES[dtype], file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the headers of all files in an index; each tensor must be where the index says, and nowhere else."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index}: weight_map should give the file of each tensor")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file!r} is not the name of a safetensors file beside it")
        for name, tensor in _read_header(index.parent / file).items():
            if name in tensors:
                raise CheckpointError(f"{index.parent}: tensor {name} is in both {tensors[name].file.name} and {file}")
            tensors[name] = tensor
    for name in sorted(where.keys() | tensors.keys()):
        if name not in tensors:
            raise CheckpointError(f"{index}: tensor {name} should be in {where[name]}, which does not hold it")
        if where.get(name) != tensors[name].file.name:
            said = f"in {where[name]}" if name in where else "nowhere"
            raise CheckpointError(f"{index}: tensor {name} is in {tensors[name].file.name}; the index has it {said}")
    return tensors


def _why_none(folder: Path) -> str:
    others = sorted(path.name for path in folder.iterdir())
    if variants := [name for name in others if name.endswith(".safetensors")]:
        return f"{folder} holds no {WEIGHTS[0]} or {WEIGHTS[1]}, only {variants[0]}; joyjax reads the default names"
    if pickled := [name for name in others if name.endswith(PICKLED)]:
        return f"{folder} holds pickled weights only ({pickled[0]}); joyjax reads safetensors only"
    return f"{folder} holds no weights; expected {WEIGHTS[0]} or {WEIGHTS[1]}"
