"""A rank's microbatches on a mesh: its own share from the source, and from its feature group what else it needs.

Every rank of the mesh reads its equal part of a global microbatch: with data * feature ranks, rank r the r-th. The
ranks of a feature group spread theirs among themselves,

    mlp_in   to all of them                                                all-gather
    mlp_out  as the columns that each decodes (split by columns)           all-to-all
             to all of them (split by rows)                                all-gather

as stored, before they are decoded to float32. A thread does this on process groups of its own while the steps before
compute, at most `ahead` microbatches ahead. All ranks first tell each other that they have their share: what one cannot
read (a damaged shard) ends the run on all of them at the same microbatch.

Legend: b rows that a rank reads, B rows of its feature group, L layers, D d_model, G ranks of the group.
"""

import queue
import threading
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from activation_store.batch import ActivationBatch
from activation_store.codec import Encoded, decode
from activation_store.errors import AgreedError
from trainer.model.collectives import Partitioning
from trainer.parallel.agreement import Agreement
from trainer.parallel.mesh import Mesh
from trainer.parallel.sums import all_gather
from trainer.sources import Batches

_POLL_SECONDS = 0.1


class _Item(NamedTuple):
    """A microbatch, and what the source says of itself once it has been given."""

    batch: ActivationBatch
    epochs: float
    state: dict[str, Any]
    # On a GPU: when it is there.
    ready: "torch.cuda.Event | None"


class Feed(Batches):
    """`source`'s microbatches as this rank's model wants them: mlp_in (B, L, D), mlp_out (B, L, columns), float32.

    Position, epochs and state are those of the microbatches that were given, however far ahead the source was read.
    """

    def __init__(
        self,
        source: Batches,
        mesh: Mesh,
        partitioning: Partitioning,
        *,
        device: torch.device,
        ahead: int = 2,
    ) -> None:
        """Makes process groups; collective. `ahead`: microbatches that are ready at most."""
        self._source, self._device = source, device
        self._position, self._epochs, self._state = source.position, source.epochs, source.state()
        self._agreement = Agreement(mesh)
        self._spread = Spread(mesh, partitioning, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._ready: queue.Queue[_Item | BaseException] = queue.Queue()
        # All ranks have taken equally many microbatches when they close, and so exchange equally many: none waits for
        # another that has stopped.
        self._may_begin, self._allowed, self._closing = threading.Condition(), ahead, False
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """See Batches."""
        return self._position

    @property
    def epochs(self) -> float:
        """See Batches."""
        return self._epochs

    def state(self) -> dict[str, Any]:
        """See Batches."""
        return self._state

    def __next__(self) -> ActivationBatch:
        """The next microbatch. What any rank could not read is raised here, on all ranks at the same one."""
        while True:
            try:
                item = self._ready.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the feed's thread died; its traceback is on stderr") from None
        if isinstance(item, BaseException):
            self._ready.put(item)
            raise item
        with self._may_begin:
            self._allowed += 1
            self._may_begin.notify()
        self._position, self._epochs, self._state = self._position + 1, item.epochs, item.state
        if item.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(item.ready)
            for rows in (item.batch.mlp_in, item.batch.mlp_out):
                rows.record_stream(stream)
        return item.batch

    def close(self, *, orderly: bool = True) -> None:
        """Stops the thread and the source. All ranks close at the same position; if not (orderly=False: an error that
        the others do not know of), the thread may be waiting for them and is left behind.
        """
        with self._may_begin:
            self._closing = True
            self._may_begin.notify()
        if orderly:
            self._thread.join()
        # Its own threads wait for no other rank.
        self._source.close()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close(orderly=kind is None or issubclass(kind, AgreedError))

    def _work(self) -> None:
        """The thread: every microbatch that is allowed, then the end; an error is handed over and ends it."""
        begun = 0
        while self._may(begun):
            begun += 1
            try:
                item: _Item | BaseException = self._next()
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return

    def _may(self, begun: int) -> bool:
        """Whether one more is allowed, as soon as it is; False: closed, and none is owed to the other ranks."""
        with self._may_begin:
            self._may_begin.wait_for(lambda: begun < self._allowed or self._closing)
            return begun < self._allowed

    def _next(self) -> _Item:
        with torch.cuda.stream(self._stream):  # of none: nothing
            with self._agreement.together(), record_function("feed: read"):
                part = next(self._source)
            with record_function("feed: spread"):
                batch = self._spread(part)
            event = None
            if self._stream is not None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
        return _Item(batch, self._source.epochs, self._source.state(), event)


class Spread:
    """From what each rank of a feature group has read to what each needs. `received`: bytes that came from others."""

    def __init__(self, mesh: Mesh, partitioning: Partitioning, device: torch.device) -> None:
        """Makes a process group; collective over the mesh."""
        self._axis, self._columns, self._device = mesh.feature, partitioning.columns_split, device
        self._group = _own_feature_group(mesh)
        self.received = 0

    def __call__(self, part: ActivationBatch) -> ActivationBatch:
        """The feature group's rows (B, L, D), in the order of its ranks, on the device and decoded. Collective."""
        mlp_in, mlp_out = (rows.to(self._device).transpose(0, 1) for rows in (part.mlp_in, part.mlp_out))
        in_scale, out_scale = (
            None if scale is None else self._all(scale.to(self._device).t()[..., None])[..., 0]
            for scale in (part.mlp_in_scale, part.mlp_out_scale)
        )
        mlp_in = self._all(mlp_in)
        mlp_out = self._my_columns(mlp_out) if self._columns else self._all(mlp_out)
        return ActivationBatch(
            _decoded(mlp_in, in_scale).transpose(0, 1),
            _decoded(mlp_out, out_scale).transpose(0, 1),
            part.rows,
            part.epoch,
        )

    def _all(self, x_LbD: Tensor) -> Tensor:
        """(L, B, D) every rank's rows."""
        if self._axis.size == 1:
            return x_LbD
        out_GLbD = x_LbD.new_empty(self._axis.size, *x_LbD.shape)
        all_gather(_bytes(out_GLbD), _bytes(x_LbD.contiguous()), group=self._group)
        return self._joined(out_GLbD)

    def _my_columns(self, x_LbD: Tensor) -> Tensor:
        """(L, B, D / G) every rank's rows, of this rank's columns."""
        if self._axis.size == 1:
            return x_LbD
        send_GLbC = torch.stack(x_LbD.chunk(self._axis.size, dim=2))
        out_GLbC = torch.empty_like(send_GLbC)
        dist.all_to_all_single(_bytes(out_GLbC), _bytes(send_GLbC), group=self._group)
        return self._joined(out_GLbC)

    def _joined(self, x_GLbD: Tensor) -> Tensor:
        self.received += x_GLbD[1:].numel() * x_GLbD.element_size()
        return x_GLbD.transpose(0, 1).flatten(1, 2)


def _own_feature_group(mesh: Mesh) -> dist.ProcessGroup | None:
    """A group like the mesh's own, for one thread cannot wait on a group that another uses."""
    if mesh.feature.size == 1:
        return None
    size, own = mesh.feature.size, None
    for first in range(0, mesh.size, size):
        group = dist.new_group(list(range(first, first + size)))
        if first == mesh.data.rank * size:
            own = group
    return own


def _bytes(x: Tensor) -> Tensor:
    """Any dtype as bytes, which every backend sends."""
    return x.view(-1).view(torch.uint8)


def _decoded(values_LBD: Tensor, scale_LB: Tensor | None) -> Tensor:
    """float32, with the rows of a layer one after another."""
    if values_LBD.dtype is torch.float32 and scale_LB is None:
        return values_LBD
    return decode(Encoded(values_LBD, scale_LB))
