"""The one train step: gradients of an objective, an update per parameter group, and nothing if anything broke."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gigatok_jax import optim, sharding
from gigatok_jax.nn.constrain import gathered, placing
from gigatok_jax.train_state import TrainState

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]


def make_train_step(
    objective: Any,
    groups: Mapping[str, optim.Group],
    phase: Any,
    *,
    seed: int,
    accumulate: int = 1,
    placement: sharding.Placement | None = None,
) -> StepFn:
    """The pure step of one static phase: (state, frozen, batch) → (state, metrics).

    Groups that the phase does not train are not read by the optimiser at all: their parameters, moments, average and
    state leave as they came. All groups' gradients are taken at the old parameters, in one backward pass.

    A non-finite loss or gradient discards everything but the step and the two counters.
    """
    active = objective.active(phase)
    loss_fn = objective.loss(phase)

    def step_fn(train: TrainState, frozen: Any, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), train.step)
        idle = {name: value for name, value in train.params.items() if name not in active}

        def total(params: dict[str, Any], state: Any, batch: Any, key: jax.Array) -> Any:
            params = {name: optim.freeze(groups[name], value) for name, value in params.items()}
            params, networks = gathered({**params, **idle}), gathered(frozen)
            loss, aux = loss_fn(params, state, networks, batch, key, train.step)
            return _known_first(loss, aux), aux

        trained = {name: train.params[name] for name in active}
        with placing(placement):
            if accumulate == 1:
                (loss, (state, metrics)), gradients = jax.value_and_grad(total, has_aux=True)(
                    trained, train.state, batch, key
                )
            else:
                loss, state, metrics, gradients = _accumulated(total, trained, train.state, batch, key, accumulate)
        edited, state = objective.edited(train.params, state)
        return _apply(train, groups, active, edited, loss, state, metrics, gradients)

    return step_fn


@jax.custom_vjp
def _known_first(loss: jax.Array, aux: Any) -> jax.Array:
    """The loss; its gradient waits for all of `aux`.

    A compiler otherwise leaves the values of losses for the end, and keeps the features that they compare until then.
    """
    return loss


def _known_first_forward(loss: jax.Array, aux: Any) -> tuple[jax.Array, Any]:
    return loss, (loss, aux)


def _known_first_backward(known: Any, g: jax.Array) -> tuple[jax.Array, None]:
    return jax.lax.optimization_barrier((g, known))[0], None


_known_first.defvjp(_known_first_forward, _known_first_backward)


def lower_step(
    objective: Any,
    groups: Mapping[str, optim.Group],
    phase: Any,
    *,
    seed: int,
    accumulate: int,
    mesh: Mesh,
    preset: str,
    abstract: TrainState,
    frozen: Any,
    batch: Mapping[str, Any],
) -> jax.stages.Lowered:
    """The step of a phase, ready to compile: the state is donated and the new one lies where it lay."""
    placement = sharding.placement(mesh, preset)
    fn = make_train_step(objective, groups, phase, seed=seed, accumulate=accumulate, placement=placement)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(fn, donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)))
    return jitted.lower(abstract, frozen, batch)


def compile_step(*args: Any, **options: Any) -> jax.stages.Compiled:
    """`lower_step`, compiled."""
    return lower_step(*args, **options).compile()


def check_phases(objective: Any, num_steps: int, rows: int, abstract: TrainState, frozen: Any) -> None:
    """Traces every phase of a run: a later one would otherwise fail where it begins, days after the start.

    Args:
      rows: images of a microbatch.
    Raises:
      ValueError: a phase cannot work with these sizes.
    """
    for phase in objective.phases(num_steps):
        args = abstract.params, abstract.state, frozen, objective.batch(rows), jax.random.key(0), abstract.step
        try:
            jax.eval_shape(objective.loss(phase), *args)
        except ValueError as error:
            raise ValueError(f"the training step of {phase} cannot work: {error}") from error


def _accumulated(
    total: Callable[..., Any], params: Any, state: Any, batch: Any, key: jax.Array, count: int
) -> tuple[jax.Array, Any, Metrics, Any]:
    """Mean loss, metrics and gradients over `count` microbatches, the state threaded through them.

    Microbatch a holds rows a, a + count, …: every device takes part in every microbatch, and its statistics
    (batch norm, entropy, LeCam) are over all devices, but over this microbatch only.
    """
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))

    def body(carry: tuple[Any, Any], index_and_batch: tuple[jax.Array, Any]) -> tuple[tuple[Any, Any], Any]:
        state, gradients = carry
        index, rows = index_and_batch
        (loss, (state, metrics)), g = jax.value_and_grad(total, has_aux=True)(
            params, state, rows, jax.random.fold_in(key, index)
        )
        return (state, jax.tree.map(lambda a, b: a + b / count, gradients, g)), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, params)
    (state, gradients), (losses, metrics) = jax.lax.scan(body, (state, zeros), (jnp.arange(count), micro))
    return losses.mean(), state, jax.tree.map(lambda m: m.mean(0), metrics), gradients


def _apply(
    train: TrainState,
    groups: Mapping[str, optim.Group],
    active: tuple[str, ...],
    edited: Mapping[str, Any],
    loss: jax.Array,
    state: Any,
    metrics: Metrics,
    gradients: dict[str, Any],
) -> tuple[TrainState, Metrics]:
    """One update per active group, or none where the loss or any gradient is not finite.

    What a group trains moves from the `edited` parameters, what it does not train stays as it was.
    """
    metrics = {"loss/total": loss, **metrics}
    params, opt, ema = dict(train.params), dict(train.opt), dict(train.ema)
    finite, norms = jnp.isfinite(loss), {}
    for name in active:
        parts = optim.part_norms(gradients[name])
        norms[name] = jnp.sqrt(sum(jnp.square(part) for part in parts.values()))
        finite &= jnp.isfinite(norms[name])
        metrics[f"grad_norm/{name}"] = norms[name]
        metrics |= {f"grad_norm/{name}/{part}": value for part, value in parts.items()}
        metrics[f"learning_rate/{name}"] = groups[name].rate(train.step)
    for name in active:
        start = optim.trained(groups[name], edited[name], train.params[name])
        old = train.opt[name], optim.where(finite, start, train.params[name]), train.step
        params[name], opt[name] = optim.update_where(finite, groups[name], gradients[name], norms[name], *old)
        if name in ema:
            average = optim.average(groups[name], train.ema[name], params[name], train.step)
            ema[name] = optim.where(finite, average, train.ema[name])
    skipped = jnp.logical_not(finite).astype(jnp.int32)
    new = TrainState(
        step=train.step + 1,
        params=params,
        opt=opt,
        ema=ema,
        state=optim.where(finite, state, train.state),
        skipped=train.skipped + skipped,
        skipped_in_row=jnp.where(finite, 0, train.skipped_in_row + 1),
    )
    return new, {**metrics, "skipped": new.skipped, "skipped_in_row": new.skipped_in_row}


def broken_terms(metrics: Mapping[str, float]) -> list[str]:
    """The loss terms that are not finite; where all are, the parts whose gradients are not."""

    def broken(prefix: str, depth: int) -> list[str]:
        names = [name for name in metrics if name.startswith(prefix) and name.count("/") == depth]
        return sorted(name.removeprefix(prefix) for name in names if not jnp.isfinite(metrics[name]))

    terms = [name for name in broken("loss/", 1) if name != "total"]
    return terms or [f"gradient of {part}" for part in broken("grad_norm/", 2)] or ["total"]
