"""Reading and replacing the MLPs of a running subject.

Shape suffixes: N rows, C tokens of a row, L captured layers, D d_model, V vocabulary. A row may hold several pieces of
text: positions restart at 0 at each, from which transformers builds attention that does not cross from one to another
(`attention_mask=None`, no cache; tests/subjects holds every family to it).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from activation_store.config import InputHook
from activation_store.errors import UserError
from activation_store.subject import Subject


@dataclass(frozen=True)
class Captured:
    """What the MLPs read and wrote, in the subject's dtype and on its device."""

    mlp_in_NCLD: Tensor
    mlp_out_NCLD: Tensor


class _StopForwardError(Exception):
    """Ends a forward pass from within a hook: everything wanted has been captured."""


class CaptureHooks:
    """Captures `mlp_in` and `mlp_out` of layers [layer_start, layer_stop) of a subject.

    `input_hook` says where mlp_in is read: `resid_mid` before the MLP's norm, `mlp_in` after it. `layer_stop=None` is
    the last layer. Raises UserError for a hook that the subject does not have or a range outside of it.
    """

    def __init__(
        self, subject: Subject, *, input_hook: InputHook | str, layer_start: int = 0, layer_stop: int | None = None
    ) -> None:
        subject.spec.check_hook(input_hook, subject.text_config)
        self.subject = subject
        self.input_hook = InputHook(input_hook)
        self.layers = layer_range(subject.n_layers, layer_start, layer_stop)

    @torch.no_grad()
    def capture(self, token_ids_NC: Tensor, positions_NC: Tensor) -> Captured:
        """Run the embeddings and the layers below `layer_stop`, no further, and return what was captured.

        The forward ends as soon as the last layer's mlp_out is known: no later layer, final norm or LM head is run.
        Raises UserError for token ids outside the vocabulary and rows longer than the subject's context.
        """
        shape = (*token_ids_NC.shape, len(self.layers), self.subject.d_model)
        captured = Captured(
            *(torch.empty(shape, dtype=self.subject.dtype, device=self.subject.device) for _ in range(2))
        )
        last = self.layers[-1]

        def read(layer: int, mlp_in_NCD: Tensor) -> None:
            captured.mlp_in_NCLD[:, :, layer - self.layers.start] = mlp_in_NCD

        def write(layer: int, mlp_out_NCD: Tensor) -> None:
            captured.mlp_out_NCLD[:, :, layer - self.layers.start] = mlp_out_NCD
            if layer == last:
                raise _StopForwardError

        with _hooked(self.subject, self.input_hook, self.layers, read, write):
            try:
                _run(self.subject, token_ids_NC, positions_NC)
            except _StopForwardError:
                return captured
        raise AssertionError(f"layer {last} was not reached")


def layer_range(n_layers: int, layer_start: int, layer_stop: int | None) -> range:
    """[layer_start, layer_stop) of a subject of `n_layers` (None: to the last). UserError if it is not within it."""
    stop = n_layers if layer_stop is None else layer_stop
    if not 0 <= layer_start < stop <= n_layers:
        raise UserError(
            f"store.layer_start={layer_start} store.layer_stop={layer_stop} is not a range of the subject's {n_layers} "
            f"layers; wanted 0 <= layer_start < layer_stop <= {n_layers}"
        )
    return range(layer_start, stop)


@torch.no_grad()
def forward_logits(subject: Subject, token_ids_NC: Tensor, positions_NC: Tensor) -> Tensor:
    """The subject's own logits (N, C, V), in its dtype and on its device."""
    logits: Tensor = _run(subject, token_ids_NC, positions_NC).logits
    return logits


@torch.no_grad()
def forward_replaced(
    subject: Subject,
    token_ids_NC: Tensor,
    positions_NC: Tensor,
    *,
    input_hook: InputHook | str,
    layers: range,
    replace: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The logits (N, C, V) when, in every layer of `layers`, `replace` says what the MLP adds to the residual stream.

    `replace(layer, mlp_in_NCD, own_mlp_out_NCD)` is called once a layer in ascending order, with the values of this
    very (replaced) forward pass, and returns an (N, C, D) tensor in any floating dtype. `layers` are absolute.
    Raises UserError as CaptureHooks does.
    """
    subject.spec.check_hook(input_hook, subject.text_config)
    if layers:
        layer_range(subject.n_layers, layers[0], layers[-1] + 1)
    read_NCD: dict[int, Tensor] = {}

    def read(layer: int, mlp_in_NCD: Tensor) -> None:
        read_NCD[layer] = mlp_in_NCD

    def write(layer: int, own_mlp_out_NCD: Tensor) -> Tensor:
        new_NCD = replace(layer, read_NCD.pop(layer), own_mlp_out_NCD)
        if new_NCD.shape != own_mlp_out_NCD.shape:
            raise ValueError(f"replace() returned {tuple(new_NCD.shape)}, wanted {tuple(own_mlp_out_NCD.shape)}")
        return new_NCD.to(own_mlp_out_NCD)

    with _hooked(subject, input_hook, layers, read, write):
        return forward_logits(subject, token_ids_NC, positions_NC)


@torch.no_grad()
def run_mlp(subject: Subject, layer: int, mlp_in_NCD: Tensor, *, input_hook: InputHook | str) -> Tensor:
    """mlp_out (N, C, D) of one layer from its mlp_in: the layer's own path from `input_hook` to the residual stream."""
    subject.spec.check_hook(input_hook, subject.text_config)
    hidden_NCD = mlp_in_NCD
    for module in subject.spec.mlp_path(subject.layer(layer), input_hook):
        hidden_NCD = module(hidden_NCD)
    return hidden_NCD


@contextmanager
def _hooked(
    subject: Subject,
    input_hook: InputHook | str,
    layers: range,
    read: Callable[[int, Tensor], None],
    write: Callable[[int, Tensor], Tensor | None],
) -> Iterator[None]:
    """Calls `read` with every layer's mlp_in and `write` with its mlp_out (a tensor returned replaces it)."""
    handles = []
    try:
        for layer in layers:
            path = subject.spec.mlp_path(subject.layer(layer), input_hook)

            def pre(module: nn.Module, args: tuple[Any, ...], *, layer: int = layer) -> None:
                read(layer, args[0])

            def post(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, layer: int = layer) -> Tensor | None:
                return write(layer, output)

            handles += [path[0].register_forward_pre_hook(pre), path[-1].register_forward_hook(post)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(subject: Subject, token_ids_NC: Tensor, positions_NC: Tensor) -> Any:
    context_length, top_id = token_ids_NC.shape[1], int(token_ids_NC.max())
    if subject.max_positions is not None and context_length > subject.max_positions:
        raise UserError(
            f"text.context_length={context_length} is more than the {subject.max_positions} positions of "
            f"{subject.info.path}; use at most {subject.max_positions}"
        )
    if top_id >= subject.info.vocab_size:
        raise UserError(
            f"token id {top_id} is outside the vocabulary of {subject.info.path} ({subject.info.vocab_size} tokens): "
            "its tokenizer belongs to another model; use the subject's own"
        )
    device = subject.device
    return subject.model(
        input_ids=token_ids_NC.to(device), position_ids=positions_NC.to(device), attention_mask=None, use_cache=False
    )
