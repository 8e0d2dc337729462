"""Full precision in a scope: TF32, reduced-precision reductions and autocast are off inside.

Autocast belongs to a thread. The precision of float32 products and of reductions belongs to the
process, so threads share it: the first to enter `exact` sets it, and the last to leave restores it.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

_MKLDNN: Any = torch.backends.mkldnn  # torch does not declare these attributes
_CUDNN: Any = torch.backends.cudnn
_BACKENDS = (torch.backends.cuda.matmul, _MKLDNN.matmul, _CUDNN.conv, _MKLDNN.conv)
_REDUCTIONS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
)


@contextmanager
def exact(*, alone: bool = False) -> Iterator[None]:
    """Computes in the dtype that the tensors have, whatever the caller's global settings are.

    Within the scope float32 products are IEEE float32, and autocast is off on every device in use.
    Afterwards each setting is what it was. Scopes may be nested, and several threads may be inside
    at once.

    Args:
        alone: whether to wait until no other thread is inside, and to keep others out until the
            scope ends. A thread that will use `products` inside should ask for it, and must not
            wait inside for a thread that has yet to enter.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    scopes = [torch.autocast(device, enabled=False) for device in devices]
    full = _Flags(("ieee",) * len(_BACKENDS), (False,) * len(_REDUCTIONS))
    with _held(lambda _: full, alone), ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(scope)
        yield


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the scope, float32 products are computed in `precision` if the hardware has it.

    `precision` is torch's name of it, such as "tf32". Afterwards the setting is what it was. The
    setting belongs to the process, and two threads cannot have different ones. So the scope waits
    until no other thread is inside `exact` or `products`, and keeps others out until it ends.

    Raises:
        RuntimeError: this thread and another are both inside `exact` and both ask to be alone, so
            that each would wait for the other.
    """
    with _held(lambda flags: flags._replace(products=(precision,) * len(_BACKENDS)), alone=True):
        yield


def settings() -> dict[str, str]:
    """The settings in effect, for a report: the precision of products and autocast, by device."""
    return {
        "float32 matmul cuda": torch.backends.cuda.matmul.fp32_precision,
        "float32 matmul cpu": _MKLDNN.matmul.fp32_precision,
        "autocast cpu": str(torch.is_autocast_enabled("cpu")).lower(),
        "autocast cuda": str(torch.is_autocast_enabled("cuda")).lower(),
    }


class _Flags(NamedTuple):
    """The settings of the process."""

    products: tuple[str, ...]  # one for each of _BACKENDS
    reductions: tuple[bool, ...]  # one for each of _REDUCTIONS


def _read() -> _Flags:
    matmul = torch.backends.cuda.matmul
    return _Flags(
        tuple(backend.fp32_precision for backend in _BACKENDS),
        tuple(getattr(matmul, name) for name in _REDUCTIONS),
    )


def _write(flags: _Flags) -> None:
    for backend, precision in zip(_BACKENDS, flags.products, strict=True):
        backend.fp32_precision = precision
    for name, allowed in zip(_REDUCTIONS, flags.reductions, strict=True):
        setattr(torch.backends.cuda.matmul, name, allowed)


class _Gate:
    """The threads inside: any number that agree on the flags, or a single one that changes them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.scopes: Counter[int] = Counter()  # open scopes, by thread
        self.alone: Counter[int] = Counter()  # those of them that keep others out
        self.waiting: list[int] = []  # threads that ask to be alone
        self.saved: _Flags | None = None  # the flags before the first thread entered

    def enter(self, thread: int, alone: bool) -> _Flags:
        """Waits until the thread may enter. Returns the flags before it does."""
        with self.changed:
            if alone:
                self._wait_alone(thread)
                self.alone[thread] += 1
            elif thread not in self.scopes:
                self.changed.wait_for(lambda: not self.alone and not self.waiting)
            before = _read()
            if not self.scopes:
                self.saved = before
            self.scopes[thread] += 1
            return before

    def leave(self, thread: int, alone: bool, before: _Flags) -> None:
        """Restores the flags, unless other threads still need them as they are."""
        with self.changed:
            _drop(self.scopes, thread)
            if alone:
                _drop(self.alone, thread)
            if not self.scopes and self.saved is not None:
                _write(self.saved)
                self.saved = None
            elif set(self.scopes) == {thread}:
                _write(before)
            self.changed.notify_all()

    def _wait_alone(self, thread: int) -> None:
        if thread in self.scopes and any(other in self.scopes for other in self.waiting):
            raise RuntimeError(
                "products: this thread and another are both inside exact(), and both ask to be the "
                "only one there, so each would wait for the other. Ask with exact(alone=True) "
                "before computing, as sweep does for matmul='tf32'."
            )
        self.waiting.append(thread)
        try:
            self.changed.wait_for(lambda: set(self.scopes) <= {thread})
        finally:
            self.waiting.remove(thread)
            self.changed.notify_all()


_gate = _Gate()


@contextmanager
def _held(change: Callable[[_Flags], _Flags], alone: bool) -> Iterator[None]:
    """A scope in which the process has the changed flags."""
    thread = threading.get_ident()
    before = _gate.enter(thread, alone)
    try:
        _write(change(before))
        yield
    finally:
        _gate.leave(thread, alone, before)


def _drop(counts: Counter[int], thread: int) -> None:
    counts[thread] -= 1
    if not counts[thread]:
        del counts[thread]
