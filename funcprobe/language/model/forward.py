"""The two halves of a language model's forward pass, body and head, as functions of its tensors."""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.func import functional_call

from ..packing import Layout, visible
from . import attention
from .float64 import Float64
from .skeleton import causal_model, duplicate

Params = dict[str, Tensor]


class Halves(NamedTuple):
    """A copy of a skeleton that one call has for itself, and the two halves that are run."""

    whole: nn.Module
    body: nn.Module  # the decoder, under the names of the whole module, prefixed by "whole."
    head: nn.Module  # what the module does to the decoder's output: its head and its scalings


@dataclass(frozen=True, eq=False, repr=False)
class Forward:
    """Body and head of a module that holds no weight: every call is given all tensors.

    ``logits = head(params, base, states(params, base, layout))``. `forward_of` makes it.

    Several threads may call it at once. `functional_call` puts the tensors into a module and takes
    them out again, so two calls in the same module would read each other's. The skeleton itself is
    therefore never run: a call borrows a copy that no other call is using, and makes one if there
    is none. There are as many copies as there were calls at once, one for each thread. They are
    neither pickled nor deep-copied.
    """

    skeleton: nn.Module  # the whole unwrapped module, on meta, in eval mode, without hooks
    float64: bool  # computes in float64 throughout
    names: frozenset[str]  # of params and base together
    aliases: dict[str, str]  # a tied tensor's other name in the module -> its name
    head_tensors: dict[str, str]  # a tensor's name in the head -> its name in params or base
    _idle: deque[Halves] = field(default_factory=deque, init=False)

    def states(self, params: Params, base: Params, layout: Layout) -> Tensor:
        """The final hidden states at the T places that a layout reads, [T, D].

        Right padding lies in every token's future, so the causal mask alone is exact.
        """
        tensors = base | params
        self._check_names(tensors)
        whole = {f"whole.{name}": tensor for name, tensor in tensors.items()}
        whole |= {f"whole.{alias}": tensors[name] for alias, name in self.aliases.items()}
        inputs: dict[str, Any] = {"input_ids": layout.tokens, "use_cache": False}
        if layout.segment is not None:
            dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
            inputs["attention_mask"] = visible(layout.segment, dtype)
            inputs["position_ids"] = layout.place
        with self.borrowed() as halves, self.precision():
            states = _call(halves.body, whole, inputs).last_hidden_state
            return states.flatten(0, 1).index_select(0, layout.read)

    def head(self, params: Params, base: Params, hidden: Tensor) -> Tensor:
        """Logits [..., T, V] of hidden states [..., T, D]: the module's own head and scalings.

        If every tensor that leads with V is given as the same slice of the vocabulary, the logits
        are of that slice.
        """
        tensors = {
            inner: params[name] if name in params else base[name]
            for inner, name in self.head_tensors.items()
        }
        with self.borrowed() as halves, self.precision():
            inputs = {"inputs_embeds": hidden, "use_cache": False}
            return _call(halves.head, tensors, inputs).logits

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names in params and base of the tensors that `head` uses."""
        return tuple(dict.fromkeys(self.head_tensors.values()))

    def precision(self) -> AbstractContextManager[Any]:
        """The scope that both halves compute in: float64 throughout, or nothing."""
        return Float64() if self.float64 else nullcontext()

    @contextmanager
    def borrowed(self) -> Iterator[Halves]:
        """A copy of the skeleton that no other call uses within the scope."""
        try:
            halves = self._idle.pop()  # atomic, as `append` is
        except IndexError:
            halves = _halves(duplicate(self.skeleton))
        try:
            yield halves
        finally:
            self._idle.append(halves)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_idle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _idle=deque())
        attention.register()  # the process that unpickles may never have split a module

    def _check_names(self, tensors: Params) -> None:
        if tensors.keys() != self.names:
            unknown = sorted(tensors.keys() - self.names)
            missing = sorted(self.names - tensors.keys())
            raise ValueError(
                f"model: exactly the {len(self.names)} names of params and base were expected; "
                f"{len(missing)} are missing {missing[:5]}, {len(unknown)} are unknown "
                f"{unknown[:5]}. Pass the params and base that split() gave with this model."
            )


def forward_of(skeleton: nn.Module, names: dict[int, str], *, float64: bool) -> Forward:
    """The halves of a skeleton.

    Args:
        skeleton: from `make_skeleton`; nothing may change it from now on.
        names: the name in params or base by the id of the skeleton's tensor.
        float64: whether to compute in float64 throughout.

    Raises:
        ValueError: the module is no decoder below a language-model head.
    """
    halves = _halves(skeleton)
    whole = _tensor_names(halves.whole, names)
    return Forward(
        skeleton=skeleton,
        float64=float64,
        names=frozenset(whole.values()),
        aliases={alias: name for alias, name in whole.items() if alias != name},
        head_tensors=_tensor_names(halves.head, names),
    )


class _Body(nn.Module):
    """Runs the decoder inside the whole module, so that the names are the whole module's."""

    def __init__(self, whole: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.whole = whole
        self._decoder = (decoder,)

    def forward(self, **inputs: Any) -> Any:
        return self._decoder[0](**inputs)


class _Passed(nn.Module):
    """Stands in for the decoder: it passes the hidden states on to the module's own head.

    What else a head asks of a decoder or its output is None: `check_head` tells if it mattered.
    """

    @property
    def decoder(self) -> "_Passed":
        """Some architectures (OPT) call the decoder within the decoder."""
        return self

    def forward(self, input_ids: None = None, *, inputs_embeds: Tensor, **_: Any) -> Any:
        return _Output((inputs_embeds,))

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name.startswith("_") else None


class _Output(tuple[Tensor]):
    """The output of a decoder: its hidden states, and None for every other field.

    It is no `ModelOutput`, whose subclasses change a table of torch when they are defined.
    """

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


def _halves(whole: nn.Module) -> Halves:
    causal: Any = causal_model(whole)
    prefix = getattr(causal, "base_model_prefix", "")
    decoder = getattr(causal, prefix, None) if prefix else None
    if decoder is None or causal.get_output_embeddings() is None:
        raise ValueError(
            f"split: a Hugging Face decoder-only causal language model was expected, "
            f"{type(causal).__name__} has no decoder below a language-model head."
        )
    head = copy.copy(causal)
    head._modules = dict(causal._modules) | {prefix: _Passed()}
    return Halves(whole, _Body(whole, decoder), head)


def _tensor_names(module: nn.Module, names: dict[int, str]) -> dict[str, str]:
    """The name in params or base of each of a module's tensors, tied ones included."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {inner: names[id(tensor)] for inner, tensor in [*parameters, *buffers]}


def _call(module: nn.Module, tensors: Params, inputs: dict[str, Any]) -> Any:
    """`functional_call` with every name given, tied ones too, so that no call searches for ties."""
    return functional_call(module, tensors, (), inputs, tie_weights=False)
