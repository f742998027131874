"""What the TPU compiler said, kept: the same program is not compiled twice, and a search that ended early goes on.

A directory is named by `KPT_TPU_COMPILED`; without it nothing is kept. An answer is found by all that it depends on:
the program's text, the slice, the options, the compiler's version, and the code that reads its dump.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_pytorch.backends.tpu import buffers, compiler, packages, scans
from kernel_pytorch.backends.tpu.compiler import Compiled
from kernel_pytorch.backends.tpu.topology import Topology
from kernel_pytorch.errors import KptError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["keep", "kept", "place_of"]

_DIRECTORY = "KPT_TPU_COMPILED"
_READERS = (compiler, buffers, scans)


def place_of(stablehlo: bytes, topology: Topology, options: Mapping[str, Any]) -> Path | None:
    """Return the file of the answer to a request; `None` where nothing is to be kept."""
    directory = os.environ.get(_DIRECTORY)
    if not directory:
        return None
    versions = packages.installation().versions
    asked = [topology.name, options, {name: versions.get(name, "") for name in ("libtpu", "jax", "jaxlib")}, _code()]
    digest = hashlib.sha256(stablehlo)
    digest.update(json.dumps(asked, sort_keys=True).encode())
    return Path(directory, f"{digest.hexdigest()[:32]}.json")


def kept(place: Path) -> Compiled | None:
    """Return the answer in a file; `None` where there is none.

    Raises:
        KptError: The file is no such answer.
    """
    from pydantic import ValidationError

    if not place.exists():
        return None
    try:
        found: Compiled = _adapter().validate_json(place.read_bytes())
    except ValidationError as error:
        raise KptError(
            f"{place} is not what the compiler said: {error.errors()[0]['msg']}", fix=f"rm {place}"
        ) from error
    return found


def keep(place: Path, compiled: Compiled) -> None:
    """Write an answer, whole or not at all.

    Raises:
        OSError: The directory cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".compiled-", delete=False) as file:
        # Not `dump_json`, which writes NaN as null.
        file.write(json.dumps(_adapter().dump_python(compiled, mode="json")).encode())
    Path(file.name).replace(place)


@cache
def _adapter() -> TypeAdapter[Compiled]:
    from pydantic import TypeAdapter

    return TypeAdapter(Compiled)


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for module in _READERS:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()
