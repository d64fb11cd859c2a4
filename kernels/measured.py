"""Measurements that ship with joyjax, for devices where kernels were checked and timed at a model's own shapes.

An entry has the fields of `joyjax.runtime.kernel_cache.Key`, without driver and version of joyjax, and the rows of the
measurement. None yet: on the H100 of docs/kernels.md the kernels were timed, and their results not yet checked.
"""

from collections.abc import Mapping
from typing import Any

MEASURED: tuple[Mapping[str, Any], ...] = ()
