"""A run's model of which one source layer is in memory at a time, read from the checkpoint when it is wanted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from activation_store.errors import UserError
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.load import kernel_backend
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec


class StreamedModel:
    """`model` has all buffers (scaling, thresholds); parameters of a layer while it is open, in float32 on `device`."""

    def __init__(self, checkpoint: Checkpoint, config: RunConfig, device: torch.device) -> None:
        """Raises UserError if training has removed the checkpoint in the meantime."""
        self._checkpoint, self._device = checkpoint, device
        with torch.device("meta"):  # shapes without memory
            model = CrossLayerTranscoder(ModelSpec(**checkpoint.state["spec"]), backend=kernel_backend(config, device))
        self.model = model.eval().requires_grad_(False)
        with self._there():
            self._reader = checkpoint.reader()
            for name, _ in list(model.named_buffers()):
                setattr(model, name, self._reader.tensor(name).to(device))

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return self.model.spec

    @contextmanager
    def layer(self, s: int) -> Iterator[CrossLayerTranscoder]:
        """The model, with the parameters of source layer `s` until the block ends."""
        module = self.model.source_layers[s]
        empty = dict(module.named_parameters())
        with self._there():
            for name in empty:
                value = self._reader.tensor(f"layers.{s}.{name}").to(self._device, torch.float32)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        try:
            yield self.model
        finally:
            for name, parameter in empty.items():
                setattr(module, name, parameter)

    @contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(
                f"checkpoint {self._checkpoint.path} was removed while it was about to be read: its run is being "
                "trained; try again when training has ended"
            ) from None
