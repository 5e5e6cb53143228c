"""`layerloom tune`: the break-even of the configured model on this machine, printed and kept for `train`."""

from activation_store.device import resolve_device
from activation_store.errors import UserError
from activation_store.places import store_place
from activation_store.progress import Progress
from activation_store.store import ActivationStore
from launch.config import LayerloomConfig
from trainer.build import model_spec
from trainer.kernels.dispatch import words_of
from trainer.tune import DENSITIES, Measured, measure
from trainer.tuned import choose_backend, compute_dtype, machine, save


def run_tune(config: LayerloomConfig) -> None:
    """Measures, prints the table and writes it. Raises UserError if neither a store nor a shape is given."""
    device, dtype = resolve_device(config.device), compute_dtype(config)
    spec = model_spec(config.model, config.activation, *_shape(config))
    choice = choose_backend(config.kernels.backend, device)
    its_machine = machine(device, choice.kernels.name, dtype)
    where = [its_machine["hardware"], its_machine["dtype"], f"kernels {words_of(choice, dtype)}"]
    where += [f"threads: {its_machine['threads']}"] if device.type == "cpu" else []
    shape = f"{spec.n_layers} layers of width {spec.d_model}, {spec.n_features} features each, {spec.kind}"
    print(f"tune: {', '.join(where)}; {shape}")
    with Progress("tune", total=len(DENSITIES), unit="densities") as progress:
        measured = measure(
            spec,
            n_tokens=config.train.microbatch_tokens or config.train.batch_size_tokens,
            kernels=choice.kernels,
            device=device,
            compute_dtype=dtype,
            seconds=config.tune.seconds,
            tell=lambda timing: progress.advance(note=f"{timing.density:.1%} of the entries active"),
        )
        # It ends where dense wins.
        progress.total = progress.done
    print(_table(measured))
    file = save(its_machine, spec, measured)
    print(f"tune: dense is faster above a density of {measured.density:.3g}; kept for train in {file}")


def _shape(config: LayerloomConfig) -> tuple[int, int]:
    """Layers and width: as told, or those of the store."""
    if config.tune.n_layers:
        return config.tune.n_layers, config.tune.d_model
    try:
        store = ActivationStore.open(store_place(config.store))
    except UserError as error:
        raise UserError(
            f"{error}; or give the shape without a store: tune.n_layers=30 tune.d_model=576 (for example)"
        ) from error
    return store.n_layers, store.d_model


def _table(measured: Measured) -> str:
    """One layer's forward and backward after selection, at each density."""
    head = f"one layer, {measured.tokens} tokens, forward and backward after selection:"
    rows = [
        f"{timing.density:8.2%} {timing.sparse_s * 1e3:10.2f} {timing.dense_s * 1e3:10.2f}"
        for timing in measured.timings
    ]
    return "\n".join([head, " density  sparse ms   dense ms", *rows])
