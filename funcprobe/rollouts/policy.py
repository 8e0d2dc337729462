"""What a policy has to have, to be sampled and scored."""

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ..calculus.tree import Params
from ..language.model.split import Model
from ..language.sampling import Sampling


class Policy(Protocol):
    """A model at some parameters, and the settings it is sampled with.

    A `Checkpoint` is a policy, and so is any object with these attributes, such as a NamedTuple of
    one's own.
    """

    @property
    def model(self) -> Model:
        """The pure half of the model, from `split`."""
        ...

    @property
    def params(self) -> Params:
        """The trainable parameters."""
        ...

    @property
    def base(self) -> Params:
        """The frozen tensors."""
        ...

    @property
    def sampling(self) -> Sampling:
        """Temperature, top-p, top-k and min-p."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Turns texts into token ids and back; None where prompts are token ids already."""
        ...
