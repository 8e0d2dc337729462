"""Full precision in a scope: TF32, reduced-precision reductions and autocast off, then restored."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.conv,
)
_REDUCTIONS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
)


@contextmanager
def exact() -> Iterator[None]:
    """Computes in the dtype that the tensors have, whatever the caller's global settings are.

    Within the scope float32 products are IEEE float32 and autocast is off on every device in use;
    afterwards each setting is what it was.
    """
    reductions = [getattr(torch.backends.cuda.matmul, name) for name in _REDUCTIONS]
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    scopes = [torch.autocast(device, enabled=False) for device in devices]
    try:
        for name in _REDUCTIONS:
            setattr(torch.backends.cuda.matmul, name, False)
        with products("ieee"), ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(scope)
            yield
    finally:
        for name, value in zip(_REDUCTIONS, reductions, strict=True):
            setattr(torch.backends.cuda.matmul, name, value)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Float32 matrix products in "tf32" where the hardware has it, then as they were."""
    before = [backend.fp32_precision for backend in _BACKENDS]
    try:
        for backend in _BACKENDS:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, value in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = value


def settings() -> dict[str, str]:
    """The effective settings here, for a report: products by backend, autocast."""
    return {
        "float32 matmul cuda": torch.backends.cuda.matmul.fp32_precision,
        "float32 matmul cpu": torch.backends.mkldnn.matmul.fp32_precision,
        "autocast cpu": str(torch.is_autocast_enabled("cpu")).lower(),
        "autocast cuda": str(torch.is_autocast_enabled("cuda")).lower(),
    }
