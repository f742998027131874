"""Compile kernels for GPUs that are not here: Triton needs no driver for that.

Each `*_kernel.py` exposes `COMPILE_CASES`; `tests/ops/test_compile_targets.py` compiles all of them for `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "CompileCase", "Target", "compile_case", "compile_for"]


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture, as `triton.backends.compiler.GPUTarget` names it.

    Attributes:
        name: `sm_90`, `gfx942`, ...
        backend: `cuda` or `hip`.
        arch: Compute capability times ten for `cuda`; the name for `hip`.
        warp_size: Threads of a warp (wavefront).
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int


TARGETS: tuple[Target, ...] = (
    Target("sm_80", "cuda", 80, 32),
    Target("sm_89", "cuda", 89, 32),
    Target("sm_90", "cuda", 90, 32),
    Target("sm_100", "cuda", 100, 32),
    Target("sm_103", "cuda", 103, 32),
    Target("sm_120", "cuda", 120, 32),
    Target("gfx942", "hip", "gfx942", 64),
    Target("gfx950", "hip", "gfx950", 64),
)


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One specialisation of a kernel.

    Attributes:
        kernel: The `triton.jit` function.
        signature: Type of each argument that is no constant (`*bf16`, `*fp32`, `i32`, `i64`, `fp32`), by name.
        constexprs: Value of each `tl.constexpr` argument, by name. An optional pointer that is absent belongs here,
            as `None`.
        num_warps: Warps a program.
        num_stages: Depth of software pipelining; `None` leaves it to Triton.
        divisible: Arguments that are multiples of 16 (pointers: aligned to 16 bytes), as a launch would find out;
            `None` means all pointers and integers. It decides how wide accesses are.
        label: For test names, where one kernel has several cases: `bf16`, `residual`, ...
        targets: Names of the targets it is for, where a format needs newer ones; `None` means all.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int | None = None
    divisible: tuple[str, ...] | None = None
    label: str = ""
    targets: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The kernel's name, and the label after a hyphen."""
        name = str(self.kernel.__name__)
        return f"{name}-{self.label}" if self.label else name


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: Target,
    *,
    num_warps: int = 4,
    num_stages: int | None = None,
    divisible: tuple[str, ...] | None = None,
) -> Any:
    """Compile a kernel for a target and return Triton's compiled kernel: `.asm["ptx"]`, `.metadata.shared`, ...

    Args:
        kernel: The `triton.jit` function.
        signature: As in `CompileCase`.
        constexprs: As in `CompileCase`.
        target: What to compile for; it need not be present.
        num_warps: Warps a program.
        num_stages: Depth of software pipelining; `None` leaves it to Triton.
        divisible: As in `CompileCase`.

    Raises:
        ValueError: Arguments are missing or unknown.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    wrong = set(names) ^ (set(signature) | set(constexprs))
    if wrong:
        raise ValueError(f"{kernel.__name__}: missing or unknown arguments {sorted(wrong)}; it takes {names}")
    wide = divisible
    if wide is None:
        wide = tuple(n for n, kind in signature.items() if kind.startswith("*") or kind in ("i32", "i64"))
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs=dict(constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in wide},
    )
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if num_stages is not None:
        options["num_stages"] = num_stages
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=options)


def compile_case(case: CompileCase, target: Target) -> Any:
    """Compile one case for one target."""
    return compile_for(
        case.kernel,
        case.signature,
        case.constexprs,
        target,
        num_warps=case.num_warps,
        num_stages=case.num_stages,
        divisible=case.divisible,
    )
