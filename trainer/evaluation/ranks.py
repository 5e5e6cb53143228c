"""`layerloom evaluate` by several processes, each with its part of the transcoder: which meshes, and how all stop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from activation_store.errors import AgreedInterruptError, UserError
from activation_store.progress import report
from trainer.config import DecoderSplit, ParallelConfig
from trainer.interrupt import StopRequest
from trainer.model.spec import ModelSpec
from trainer.parallel.agreement import Agreement
from trainer.parallel.mesh import Mesh
from trainer.rules import check_columns, check_features


def check_axes(parallel: ParallelConfig) -> None:
    """Raises UserError unless the mesh is a feature axis. Reads nothing."""
    if parallel.feature < 1:
        raise UserError(f"parallel.feature={parallel.feature} must be at least 1")
    if parallel.data != 1:
        raise UserError(
            f"parallel.data={parallel.data}: evaluate shares out the transcoder, not the tokens; use parallel.data=1 "
            f"and parallel.feature={max(1, parallel.data * parallel.feature)}"
        )


def columns_split(parallel: ParallelConfig, spec: ModelSpec) -> bool:
    """Whether decoders are split by columns, which auto does where d_model can be; else by rows.

    Raises UserError for a transcoder that cannot be split evenly.
    """
    check_features(spec.n_features, parallel)
    if parallel.decoder_split is DecoderSplit.auto:
        return spec.d_model % parallel.feature == 0
    if parallel.decoder_split is DecoderSplit.rows:
        return False
    check_columns(spec.d_model, parallel)
    return True


@contextmanager
def stopped_together(mesh: Mesh, agreement: Agreement) -> Iterator[Callable[[], None]]:
    """Yields what is to be called now and then: it raises AgreedInterruptError on all ranks once one got a SIGINT or
    SIGTERM. A single process is interrupted where it is, as ever.
    """
    if mesh.size == 1:
        yield lambda: None
        return
    with StopRequest(told_later=True) as stop:

        def end_if_asked() -> None:
            if agreement.any(stop.requested):
                report("evaluate: stopped; nothing was written")
                raise AgreedInterruptError

        yield end_if_asked
