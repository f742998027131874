"""Train a float32 model in bfloat16: parameters and optimizer state too, or with float32 masters.

`dtype(how=autocast)` casts operator by operator and keeps the rest in float32. The policies here run everything in
bfloat16, so that no casts stand between the operators. `master_weights` is the mixed precision of Micikevicius et al.,
"Mixed Precision Training" (ICLR 2018), without a loss scale, which bfloat16 does not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from kernel_pytorch.core.protocols import Program
from kernel_pytorch.core.types import DeviceSpec, Mode, Numerics, Prediction, Skip, Step, WorkloadSpec
from kernel_pytorch.core.versions import count_fused_updates
from kernel_pytorch.errors import CandidateError
from kernel_pytorch.transforms.dtype import Dtype, autocast, cast, cast_parameters, main_dtype
from kernel_pytorch.transforms.plain_source import plain_source
from kernel_pytorch.transforms.scoped import Scoped, inside_settings, scoped
from kernel_pytorch.transforms.trees import map_tensors

__all__ = ["PrecisionPolicy", "castable", "in_bfloat16", "shadows", "shrink", "state_to", "wide_checkpoint"]

_POLICIES = ("autocast_bf16", "pure_bf16", "master_weights")


def castable(model: nn.Module, back: torch.dtype) -> list[tuple[dict[str, Any], str]]:
    """Return the places (table, name) of the parameters and buffers of dtype `back` that compute in bfloat16.

    Left out are normalisations with running statistics (a mean updated in bfloat16 stops moving; their kernels take
    bfloat16 inputs with float32 parameters), rotary frequencies, and what a Hugging Face model keeps in float32.
    """
    precious = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    places = []
    for path, module in model.named_modules():
        if isinstance(module, _NormBase) or any(part in path.split(".") for part in precious):
            continue
        for table in (module._parameters, module._buffers):  # noqa: SLF001
            for name, tensor in table.items():
                if tensor is not None and tensor.dtype is back and not name.endswith("inv_freq"):
                    places.append((table, name))
    return places


def shadows(model: nn.Module, back: torch.dtype) -> list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]:
    """Return (table, name, master, copy) for each place: one bfloat16 leaf per tensor, ties kept.

    The copies are leaves that live on, so that compiled code and CUDA graphs find them where they were; what
    backward accumulates in one is added to its master's gradient and freed.
    """
    copies: dict[int, torch.Tensor] = {}

    def to_master(master: torch.Tensor) -> Any:
        def hook(copy: torch.Tensor) -> None:
            gradient, copy.grad = copy.grad, None
            if gradient is not None:
                master.grad = gradient.to(master.dtype) if master.grad is None else master.grad.add_(gradient)

        return hook

    found = []
    for table, name in castable(model, back):
        master = table[name]
        if id(master) not in copies:
            copy = copies[id(master)] = master.detach().to(torch.bfloat16)
            if isinstance(master, nn.Parameter):
                copies[id(master)] = copy = nn.Parameter(copy, requires_grad=master.requires_grad)
            if master.requires_grad:
                copy.register_post_accumulate_grad_hook(to_master(master))
        found.append((table, name, master, copies[id(master)]))
    return found


@contextmanager
def in_bfloat16(
    places: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]], seen: list[int]
) -> Iterator[None]:
    """Put the copies, brought up to date, in the places of their masters; a buffer that is written is written back."""
    if any(table[name] is not master for table, name, master, _ in places):
        raise RuntimeError("parameters were replaced since the plan was applied: restore the model and apply it again")
    pairs = list({id(master): (master, copy) for _, _, master, copy in places}.values())
    versions = [master._version for master, _ in pairs]  # noqa: SLF001
    old = seen or [-1] * len(pairs)
    # Values are copied at every call: an update replayed by a CUDA graph moves no version. But the copies' version
    # moves only with the masters', or a second forward before the backward would invalidate the first.
    written = [copy if now != then else copy.data for (_, copy), now, then in zip(pairs, versions, old, strict=True)]
    with torch.no_grad():
        torch._foreach_copy_(written, [master for master, _ in pairs])
    seen[:] = versions
    before = [copy._version for _, copy in pairs]  # noqa: SLF001
    for table, name, _, copy in places:
        table[name] = copy
    try:
        yield
    finally:
        for table, name, master, _ in places:
            table[name] = master
        for (master, copy), version in zip(pairs, before, strict=True):
            if copy._version != version and not copy.requires_grad:  # noqa: SLF001
                master.copy_(copy)


def shrink(model: nn.Module, optimizer: torch.optim.Optimizer | None, back: torch.dtype) -> list[tuple[Any, Any, int]]:
    """Turn parameters, buffers, gradients and optimizer state into bfloat16 in place; keep what they were on the host.

    Returns (tensor, what it held, version) of each. The parameters stay the same objects.
    """
    wanted = {id(table[name]) for table, name in castable(model, back)}
    changed = []
    for tensor, held, version in cast_parameters(model, torch.bfloat16, back):
        if id(tensor) not in wanted:
            tensor.data = held
            continue
        if tensor.grad is not None:
            tensor.grad = tensor.grad.to(torch.bfloat16)
        changed.append((tensor, held.cpu(), version))
    if optimizer is not None:
        state_to(optimizer, torch.bfloat16)
    return changed


def state_to(optimizer: torch.optim.Optimizer, to: torch.dtype) -> None:
    """Convert the moments that an optimizer keeps of parameters of a dtype to that dtype; counters stay as they are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if name != "step" and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = value.to(to) if parameter.dtype is to and value.is_floating_point() else value


def wide_checkpoint(model: nn.Module, back: torch.dtype) -> Any:
    """Let `state_dict` of the model return copies of dtype `back` of what is shrunk; return the handle that ends it."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {name for name, tensor in tensors if tensor.dtype is torch.bfloat16}

    def widen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        del module, metadata
        for name in names:
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].to(back)

    return model.register_state_dict_post_hook(widen)  # type: ignore[no-untyped-call]


class PrecisionPolicy:
    """`policy=pure_bf16|master_weights|autocast_bf16` for the training of a float32 model.

    - `pure_bf16`: parameters, gradients and optimizer state are bfloat16: half the memory, and updates smaller than
      1/256 of a parameter are lost. `state_dict()` returns float32 copies (write checkpoints with `load_state_dict`,
      not through the returned tensors), and loading rounds.
    - `master_weights`: parameters, gradients, optimizer and `state_dict` stay float32; the forward computes with
      bfloat16 copies, written at each call (2 bytes of memory and 6 bytes moved per parameter). Gradients arrive by
      `backward`; `torch.autograd.grad` does not reach the masters.
    - `autocast_bf16`: autocast around the model and around the loss where the program has one.
    """

    name = "precision_policy"
    summary = "train in bfloat16, with or without float32 masters"
    group = "precision"
    numerics = Numerics.LOWER_PRECISION
    modes = frozenset({Mode.TRAINING})
    compiles = False

    def probe(self, device: DeviceSpec) -> Skip | None:  # noqa: ARG002
        """bfloat16 runs everywhere, if slowly without hardware for it."""
        return None

    def propose(self, workload: WorkloadSpec, device: DeviceSpec) -> Sequence[Step] | Skip:
        """Masters first; `dtype(how=autocast)` proposes autocast."""
        if workload.mode is not Mode.TRAINING:
            return Skip("a policy for training; dtype(how=cast) serves inference")
        if workload.dtypes[:1] != ("float32",):
            return Skip("the model's parameters are not float32")
        if device.vendor == "cpu" and not {"avx512_bf16", "amx_bf16"} & {*device.features}:
            return Skip("this CPU computes bfloat16 no faster than float32")
        return [_step("master_weights"), _step("pure_bf16")]

    def ceiling(self, step: Step, prediction: Prediction, device: DeviceSpec) -> float:
        """As for a cast; the optimizer moves half the bytes only where its state is bfloat16."""
        bound = Dtype().ceiling(Step("dtype", {"to": "bfloat16", "how": "cast"}), prediction, device)
        share = sum(s.time_share for s in prediction.shares if s.kind == "optimizer")
        if step.params.get("policy") != "pure_bf16" or not share:
            return bound
        left = 1 / bound - share / 2
        return 1 / left if left > 0 else float("inf")

    def apply(self, program: Program, step: Step) -> Program:
        """Wrap the call, and for `pure_bf16` convert parameters and state in place."""
        policy, model = str(step.params.get("policy", "")), program.model
        if policy not in _POLICIES:
            raise CandidateError(f"unknown policy {policy!r}; expected one of {', '.join(_POLICIES)}")
        back = main_dtype(model)
        if back in (torch.bfloat16, torch.float16):
            raise CandidateError(f"{step} is for float32 models; this one is {back}")
        if policy == "autocast_bf16":
            device = next((p.device.type for p in model.parameters()), "cpu")
            program.call = autocast(program.call, device, torch.bfloat16, back)
            if program.loss is not None:
                program.loss = autocast(program.loss, device, torch.bfloat16, back)
            return program
        reason = _unfit(model) if policy == "master_weights" else ""
        if reason:
            raise CandidateError(f"{step}: {reason}")
        program.call = inside_settings(program.call, lambda inner: cast(inner, torch.bfloat16, back))
        if policy == "master_weights":
            # A setting, so that what is compiled later lies inside it and finds the copies in place.
            program.call = Scoped(program.call, partial(in_bfloat16, shadows(model, back), []))
            return program
        optimizer = program.optimizer
        count_fused_updates()
        changed = shrink(model, optimizer, back)
        hook = wide_checkpoint(model, back)

        def undo() -> None:
            hook.remove()
            for tensor, held, version in changed:
                # Values trained or loaded since then are kept, at the precision they now have.
                same = tensor._version == version  # noqa: SLF001
                gradient, tensor.grad = tensor.grad, None
                tensor.data = held.to(tensor.device) if same else tensor.data.to(back)
                tensor.grad = None if gradient is None else gradient.to(back)
            if optimizer is not None:
                state_to(optimizer, back)

        program.undo.append(undo)
        return program

    def source(self, step: Step) -> str:
        """The same functions, and a call of them."""
        policy = step.params.get("policy")
        if policy == "autocast_bf16":
            return Dtype().source(Step("dtype", {"to": "bfloat16", "how": "autocast"}))
        imports = "from torch.nn.modules.batchnorm import _NormBase\n"
        back = "_back = main_dtype(model)\n"
        wrapped = "call = cast(call, torch.bfloat16, _back)\n"
        if policy == "master_weights":
            text = plain_source(
                map_tensors, main_dtype, castable, shadows, in_bfloat16, cast, scoped,
                then=back + wrapped + "_places, _seen = shadows(model, _back), []\n"
                "call = scoped(call, lambda: in_bfloat16(_places, _seen))",
            )  # fmt: skip
            return imports + text
        then = f"{back}shrink(model, optimizer, _back)\nwide_checkpoint(model, _back)\n{wrapped}"
        functions = (map_tensors, main_dtype, castable, cast_parameters, state_to, shrink, wide_checkpoint, cast)
        return imports + plain_source(*functions, then=then)


def _step(policy: str) -> Step:
    return Step("precision_policy", {"policy": policy, "to": "bfloat16"})


def _unfit(model: nn.Module) -> str:
    """Return why copies in the places of parameters would not serve a model; empty if they do."""
    if any(isinstance(m, nn.RNNBase) for m in model.modules()):
        return "recurrent layers keep a second list of their weights"
    if any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules()):
        return "gradient checkpointing recomputes after the call, when the copies are gone"
    return ""
