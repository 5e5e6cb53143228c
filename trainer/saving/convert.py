"""`layerloom checkpoint convert`: a checkpoint written anew as if by one process.

What comes out is a checkpoint as any other, whose tensors are whole: `model_00000.safetensors` and
`optimizer_00000.safetensors` are plain safetensors files, which every library reads. Moved into the `checkpoints/` of a
run, it is resumed from.
"""

from collections.abc import Iterator
from dataclasses import replace

from activation_store.errors import UserError
from activation_store.places import Place
from activation_store.progress import Progress, human_bytes, report
from trainer.saving.examine import examine
from trainer.saving.index import KINDS, Chunk, TensorEntry
from trainer.saving.ranks import Ranks
from trainer.saving.reader import CheckpointReader, open_reader
from trainer.saving.slot import Slot
from trainer.tensor_file import WrittenFile, bytes_of, file_layout, write_pieces

# Of a tensor, in memory at a time.
_BLOCK_BYTES = 1 << 26


def convert_checkpoint(source: Place, output: Place) -> None:
    """Writes `output` from a checkpoint of any mesh, a block of rows at a time.

    Raises UserError for a source that is damaged, and for an output that is there already.
    """
    if output.exists():
        raise UserError(f"output={output} is there already; give a new folder")
    problem, state = examine(source, Ranks())
    if problem is not None:
        raise UserError(f"checkpoint {source}: {problem.text}; convert an older one")
    reader = open_reader(source)
    slot = Slot(output.parent, output.name)
    slot.begin()
    try:
        index, files = {}, {}
        total = sum(entry.n_bytes for kind in KINDS for entry in reader.entries(kind).values())
        with Progress("convert", total=total, unit="B") as progress:
            for kind in KINDS:
                name = f"{kind}_00000.safetensors"
                index[kind], files[name] = _write(reader, kind, slot.path / name, progress)
        slot.commit(index, files, {key: value for key, value in state.items() if key != "files"})
    except BaseException:
        slot.abandon()
        raise
    report(f"wrote step {state['step']} to {output} ({human_bytes(sum(file.n_bytes for file in files.values()))})")


def _write(
    reader: CheckpointReader, kind: str, file: Place, progress: Progress
) -> tuple[dict[str, TensorEntry], WrittenFile]:
    """One safetensors file of all tensors of a kind; its part of the index."""
    entries = reader.entries(kind)
    layout = file_layout({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, {"format": "pt"})

    def pieces() -> Iterator[bytes | memoryview]:
        yield layout.head
        for name in layout.begins:
            for rows in _blocks(entries[name]):
                for piece in bytes_of(reader.tensor(name, kind=kind, rows=rows)):
                    yield piece
                    progress.advance(len(piece))

    written = write_pieces(file, pieces)
    index = {
        name: replace(entry, chunks=(Chunk(file.name, layout.begins[name], (0,) * len(entry.shape), entry.shape),))
        for name, entry in entries.items()
    }
    return index, written


def _blocks(entry: TensorEntry) -> Iterator[slice | None]:
    """Rows that are read at a time; None: all at once."""
    if not entry.shape or entry.n_bytes == 0:
        yield None
        return
    n_rows = entry.shape[0]
    block = max(1, _BLOCK_BYTES // (entry.n_bytes // n_rows))
    for start in range(0, n_rows, block):
        yield slice(start, min(start + block, n_rows))
