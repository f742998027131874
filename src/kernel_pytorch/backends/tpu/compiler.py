"""The real TPU compiler (libtpu) on a host without a TPU: memory, cost, collectives and fit of a StableHLO program."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_pytorch.backends.tpu.buffers import Assignment, Buffer, read_assignment, read_program, read_refusal
from kernel_pytorch.backends.tpu.scans import plain_scans
from kernel_pytorch.backends.tpu.topology import Topology
from kernel_pytorch.errors import KptError

__all__ = ["NO_WINDOWS", "Compiled", "CompilerMissingError", "compile_ahead"]

NO_WINDOWS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
"""The compiler's flag that keeps products whole: on a TPU, `LIBTPU_INIT_ARGS=--NAME=VALUE`."""

_INSTALL = "pip install 'jax==0.10.2' 'libtpu==0.0.52'"


class CompilerMissingError(KptError):
    """jax or libtpu is not installed."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler says of a program on one device of a slice.

    Attributes:
        fits: Whether it compiled; False where memory ran out, with the compiler's words in `message`.
        peak_bytes: Most HBM held at once, arguments included; 0 where it does not fit.
        temp_bytes: As the compiler reports it; may overstate, assert on the peak.
        flops: The compiler's own count: the body of a loop once, Mosaic kernels by their own estimate.
        collectives: Bytes of results by kind (`all-reduce`, ...), and `collective_counts` how many.
        seconds: Time of compilation.
        buffers: What lies in HBM at the peak, arguments first, each largest first; where it does not fit, the largest
            that the compiler lists. Empty without a dump.
        assigned_bytes: HBM of the compiler's buffer assignment: arguments, heap and results; 0 without a dump.
    """

    topology: str
    fits: bool
    message: str = ""
    peak_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: Mapping[str, int] = field(default_factory=dict)
    collective_counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    buffers: tuple[Buffer, ...] = ()
    assigned_bytes: int = 0
    software: Mapping[str, str] = field(default_factory=dict)


def compile_ahead(
    stablehlo: bytes,
    topology: Topology,
    *,
    partitions: int = 1,
    argument_shardings: Sequence[str] | None = None,
    windows: bool = True,
    dump: bool = False,
    names: Sequence[str] = (),
) -> Compiled:
    """Compile a program for a slice, without one.

    Runs in the calling process, which must not hold an initialised torch_tpu; `ahead` runs it in a child.

    Args:
        stablehlo: Text, bytecode or portable artifact.
        topology: The slice.
        partitions: Devices that the program is partitioned over; each gets its shard.
        argument_shardings: One `mhlo.sharding` string an argument, e.g. `{devices=[4,1]<=[4]}` or `{replicated}`.
        windows: Whether the partitioner may split a product whose operand it gathers into one for each device's part,
            to overlap them with the network; their results are held side by side.
        dump: Read the buffers out of the compiler's dump.
        names: Names of the arguments, for the buffers.

    Raises:
        CompilerMissingError: jax or libtpu is absent, with the command that installs them.
        KptError: The program is wrong: not memory but anything else that the compiler refuses.
    """
    try:
        import jax
        import libtpu  # noqa: F401  the compiler itself
        from jax.experimental import topologies
        from jaxlib import xla_client
    except ImportError as error:
        raise CompilerMissingError(
            f"the TPU compiler is not installed: no module {error.name!r}", fix=_INSTALL
        ) from error

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.compiler_name)
    devices = described.devices[:partitions]
    options = _options(xla_client, partitions)
    with tempfile.TemporaryDirectory(prefix="kpt-dump-") as scratch, _context():
        options.env_option_overrides = [("xla_dump_to", scratch), *(() if windows else NO_WINDOWS.items())]
        module = _parse(stablehlo)
        if argument_shardings is not None:
            _shard(module, argument_shardings)
        began = time.perf_counter()
        try:
            executable = devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), options)
        except jax.errors.JaxRuntimeError as error:
            return _refused(error, topology, time.perf_counter() - began)
        seconds = time.perf_counter() - began
        assignment = read_assignment(Path(scratch), names) if dump else Assignment(0, 0, 0)
        # Not from the executable: what a newer compiler schedules, an older jaxlib may not read.
        text = read_program(Path(scratch))
    return _read(executable, topology, seconds, assignment, text)


def _context() -> Any:
    from jax._src.interpreters import mlir

    return mlir.make_ir_context()


def _parse(source: bytes) -> Any:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    if not source.startswith(b"ML\xefR"):
        module = ir.Module.parse(plain_scans(_UNREAD.sub("", source.decode())))
    else:
        try:
            module = stablehlo.deserialize_portable_artifact(ir.Context.current, source)
        except ValueError:
            module = ir.Module.parse(source)
    return module


_UNREAD = re.compile(r", is_stable = (?:true|false)")
"""An attribute of `chlo.top_k` that jaxlib 0.10.2 does not read yet."""


def _options(xla_client: Any, partitions: int) -> Any:
    import numpy as np

    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, partitions
    places = np.arange(partitions).reshape(1, partitions)
    options.device_assignment = xla_client.DeviceAssignment.create(places)
    if partitions > 1:
        options.executable_build_options.use_spmd_partitioning = True
    return options


def _shard(module: Any, shardings: Sequence[str]) -> None:
    """Annotate the arguments, and each result that takes an argument's memory alike; other results are whole."""
    from jaxlib.mlir import ir

    main = next(op for op in module.body.operations if getattr(op, "name", None) and op.name.value == "main")
    given = list(main.arg_attrs)
    results = ["{replicated}"] * len(main.type.results)
    for i, sharding in enumerate(shardings):
        attributes = {named.name: named.attr for named in given[i]}
        attributes["mhlo.sharding"] = ir.StringAttr.get(sharding)
        given[i] = ir.DictAttr.get(attributes)
        if (output := attributes.get("tf.aliasing_output")) is not None:
            results[ir.IntegerAttr(output).value] = sharding
    main.arg_attrs = given
    named = [ir.DictAttr.get({"mhlo.sharding": ir.StringAttr.get(sharding)}) for sharding in results]
    main.attributes["res_attrs"] = ir.ArrayAttr.get(named)


def _refused(error: Exception, topology: Topology, seconds: float) -> Compiled:
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "Ran out of memory" not in said:
        raise KptError(f"the TPU compiler refuses the program: {said.splitlines()[0]}") from error
    return Compiled(
        topology.name,
        fits=False,
        message=said.strip(),
        seconds=seconds,
        buffers=read_refusal(said),
        software=_software(),
    )


def _read(executable: Any, topology: Topology, seconds: float, assignment: Assignment, text: str) -> Compiled:
    memory = executable.get_compiled_memory_stats()
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    moved, counts = _collectives(text)
    return Compiled(
        topology.name,
        fits=True,
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=moved,
        collective_counts=counts,
        seconds=seconds,
        buffers=assignment.peak,
        assigned_bytes=assignment.bytes,
        software=_software(),
    )


_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(pred|[suf]\d+\w*|bf16)\[([\d,]*)\]")


def _collectives(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return bytes of results and number of collectives by kind."""
    moved: dict[str, int] = {}
    counts: dict[str, int] = {}
    for match in _COLLECTIVE.finditer(text):
        kind = match["kind"]
        moved[kind] = moved.get(kind, 0) + sum(_array_bytes(*a) for a in _ARRAY.findall(match["shape"]))
        counts[kind] = counts.get(kind, 0) + 1
    return moved, counts


def _array_bytes(dtype: str, sizes: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    return count * bits // 8


def _software() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("libtpu", "jax", "jaxlib")}
