"""The training loop: plain PyTorch on accelerate, the same for every stage.

One step: the micro-batches' summed losses are divided by the number of supervised tokens of the whole step, so neither
accumulation nor the number of processes changes what is learned. Everything that a step depends on is a function of
the step's number or is in the state that a save holds, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from medllava.errors import CheckpointError, MedllavaError
from medllava.train.config import Optim
from medllava.train.cost import Work
from medllava.train.plots import LOG_FILE, Journal, plot_loss
from medllava.train.saves import ZERO_FOLDER, Saves
from medllava.train.waiting import Watch
from medllava.train.zero import Zero

log = logging.getLogger(__name__)

ZERO_STEPS = 10
"""So many steps in a row with a loss of exactly 0 are taken for a fault: nothing is learned."""
STOPPED = 143
"""Exit code after SIGTERM, as shells report it."""


class Stopped(MedllavaError):
    """The run was told to stop and has saved its state."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate, by name. ``decays``: the recipe's weight decay is for them."""

    name: str
    learning_rate: float
    parameters: dict[str, nn.Parameter]
    decays: bool = True


@dataclass(frozen=True)
class Pace:
    """How often things happen, in steps; ``seed`` starts the dropout and every other draw of PyTorch's."""

    seed: int
    log_every: int
    save_every: int
    eval_every: int = 0


def schedule(optim: Optim, step: int, steps: int) -> float:
    """Factor on the learning rates at ``step`` (from 0) of ``steps``."""
    rise = math.ceil(optim.warmup * steps)
    if step < rise:
        part = (step + 1) / rise
        if optim.schedule == "onecycle":
            return 0.04 + 0.96 * (1 - math.cos(math.pi * part)) / 2
        return part
    if optim.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def fit(
    *, name: str, module: nn.Module, groups: Sequence[Group], optim: Optim, steps: int, batches: Dataset[Any],
    out: Path, saves: Saves, pace: Pace, accelerator: Any, validate: Callable[[], dict[str, float]] | None = None,
    workers: int = 0, zero: Zero | None = None, work: Work | None = None, wandb: str | None = None,
) -> dict[str, float]:
    """Train ``module``, which maps a micro-batch to its summed loss; item ``step`` of ``batches`` is a list of
    micro-batches (each with ``weight``, ``ids`` and ``to``). Goes on from the newest of ``saves`` if there is one.

    validate: figures on held-out samples, ``eval_loss`` among them; the step with the lowest is saved and kept.
    work: what a step costs, for tokens per second and MFU in the log. wandb: project of Weights & Biases to log to.
    Writes ``train_log.jsonl``, ``tensorboard/`` and ``loss.png`` into ``out``; returns the last logged loss and figures
    of ``validate``. Raises MedllavaError when a loss or gradient is not finite, or the loss stays 0; Stopped
    after SIGTERM.
    """
    out.mkdir(parents=True, exist_ok=True)
    parameters = {key: value for group in groups for key, value in group.parameters.items()}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(group.parameters.values()), "lr": group.learning_rate,
                "weight_decay": optim.weight_decay * group.decays,
            }
            for group in groups
        ],
        betas=optim.betas, fused=True,
    )
    rates = [group.learning_rate for group in groups]
    torch.manual_seed(pace.seed)
    start = saves.restore(lambda file: _restore(file, parameters, optimizer, zero))
    if zero:
        wrapped, optimizer = zero.prepare(module, optimizer)
        if start:
            zero.restore(saves.folder(start))
    else:
        wrapped, optimizer = accelerator.prepare(module, optimizer)
    wrapped.train()
    device = accelerator.device
    main = accelerator.is_main_process
    losses: list[float] = []
    figures: dict[str, float] = {"step": start}
    tokens = samples = zeros = seen = 0
    operations = 0.0
    best = False
    since = time.perf_counter()
    loader = _load(batches, start, steps, workers)
    with (
        _told_to_stop() as told, Journal(out, start, enabled=main, wandb=wandb) as journal, Watch(accelerator) as watch,
        tqdm(total=steps, initial=start, desc=name, unit="step", mininterval=0.5, disable=not main) as bar,
    ):
        watch.at(f"the samples of step {start + 1}")
        for step, micro in enumerate(loader, start=start):
            watch.at(f"step {step + 1}")
            factor = schedule(optim, step, steps)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss, weight = _step(wrapped, micro, accelerator, device, zero)
            if zero:
                norm = zero.step()
            else:
                norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), optim.grad_clip or math.inf))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                ids = ", ".join(sample for batch in micro for sample in batch.ids)
                what = "loss" if not math.isfinite(loss) else "gradient"
                raise MedllavaError(
                    f"{name}: the {what} is not finite at step {step + 1}; the samples of this step: {ids}. Look at"
                    " them, or lower the learning rate; the last saved state is untouched"
                )
            zeros = zeros + 1 if loss == 0 else 0
            if zeros == ZERO_STEPS:
                raise MedllavaError(
                    f"{name}: the loss has been exactly 0 for {ZERO_STEPS} steps, up to step {step + 1}; nothing is"
                    " learned: see what is supervised with 'medllava train preview'"
                )
            if not zero:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            tokens += weight
            samples += sum(len(batch.ids) for batch in micro) * accelerator.num_processes
            if work:
                seen += sum(batch.tokens for batch in micro) * accelerator.num_processes
                operations += work.of(micro)
            bar.update()
            done = step + 1
            judge = bool(validate and pace.eval_every and (done % pace.eval_every == 0 or done == steps))
            if judge or done % pace.log_every == 0 or done == steps:
                seconds = time.perf_counter() - since
                row: dict[str, Any] = {
                    "step": done, "loss": sum(losses) / len(losses), "grad_norm": norm, "seconds": round(seconds, 3),
                    "supervised_tokens": tokens, "samples": samples,
                    "lr": {group.name: rate * factor for group, rate in zip(groups, rates, strict=True)},
                }
                row["samples_per_s"] = round(samples / seconds, 3)
                if work:
                    row["tokens_per_s"] = round(seen / seconds, 1)
                    row["mfu"] = round(operations / seconds / work.peak, 4) if work.peak else None
                figures["loss"] = row["loss"]
                if validate and judge:
                    watch.at(f"the validation after step {done}", limited=False)
                    judged = validate()
                    wrapped.train()
                    row |= judged
                    figures |= judged
                    best = saves.is_best(judged["eval_loss"])
                if main:
                    journal.add(row)
                    bar.set_postfix_str(_short(row), refresh=False)
                losses, tokens, samples, seen, operations = [], 0, 0, 0, 0.0
                since = time.perf_counter()
            figures["step"] = done
            if done < steps and (told.stop or best or done % pace.save_every == 0):
                before = time.perf_counter()
                watch.at(f"the save after step {done}", limited=False)
                write_state = partial(_save_zero, done, zero.save(out)) if zero else partial(
                    _save, done, parameters, optimizer
                )
                with zero.gathered() if zero else nullcontext():
                    if main:
                        saves.save(done, write_state, figures)
                since += time.perf_counter() - before  # the pace that is logged is that of the steps alone
            if best:
                saves.mark_best(done, figures["eval_loss"])
                best = False
            if told.stop and done < steps:
                raise Stopped(f"{name}: told to stop; saved at step {done}; run again with --resume to go on")
            watch.at(f"the samples of step {done + 1}")
    if main:
        plot_loss(out / LOG_FILE, out / "loss.png", name)
    return figures


def _short(row: dict[str, Any]) -> str:
    told = [f"loss {row['loss']:.4f}"]
    if "tokens_per_s" in row:
        told.append(f"{row['tokens_per_s']:.0f} tokens/s")
        told.append("MFU n/a" if row["mfu"] is None else f"MFU {100 * row['mfu']:.1f} %")
    return ", ".join(told)


def _step(
    wrapped: Any, micro: Sequence[Any], accelerator: Any, device: torch.device, zero: Zero | None = None
) -> tuple[float, int]:
    """Gradients of one step; the mean loss and the number of supervised tokens (or pairs) over all processes."""
    weight = sum(batch.weight for batch in micro)
    share = 1
    if accelerator.num_processes > 1:
        weight = int(accelerator.reduce(torch.tensor(weight, device=device), "sum"))
        # Gradients are averaged over the processes afterwards; the loss is a sum over all.
        share = accelerator.num_processes
    total = 0.0
    for number, batch in enumerate(micro):
        last = number == len(micro) - 1
        if zero:
            loss = wrapped(batch.to(device)) * (share / weight)
            zero.backward(loss, last=last)
        else:
            with _synchronised(accelerator, wrapped, last=last):
                loss = wrapped(batch.to(device)) * (share / weight)
                accelerator.backward(loss)
        total += float(loss.detach()) / share
    if accelerator.num_processes > 1:
        total = float(accelerator.reduce(torch.tensor(total, device=device), "sum"))
    return total, weight


@contextmanager
def _synchronised(accelerator: Any, wrapped: Any, *, last: bool) -> Iterator[None]:
    if last or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(wrapped):
            yield


def _load(batches: Dataset[Any], start: int, steps: int, workers: int) -> Any:
    if not workers:
        return (batches[step] for step in range(start, steps))
    rest = Subset(batches, range(start, steps))
    return DataLoader(rest, batch_size=None, num_workers=workers, prefetch_factor=4)


def _save(step: int, parameters: dict[str, nn.Parameter], optimizer: Any, path: Path) -> None:
    """Trained weights, optimizer and random state after ``step`` steps."""
    state = {
        "step": step,
        "weights": {name: parameter.detach().cpu() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(state, path)


def _save_zero(step: int, staging: Path, path: Path) -> None:
    """The same under ZeRO: what every process has written goes beside the rest."""
    processes = torch.distributed.get_world_size()
    torch.save({"step": step, "random": torch.get_rng_state(), "random_cuda": [], "zero": processes}, path)
    shutil.move(staging, path.parent / ZERO_FOLDER)


def _restore(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, zero: Zero | None = None
) -> int:
    """The step to go on from. What ZeRO spreads is read later, by :meth:`Zero.restore`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        processes = torch.distributed.get_world_size() if zero else None
        if state.get("zero") != processes:
            before = f"--deepspeed and {state['zero']} processes" if "zero" in state else "no --deepspeed"
            raise CheckpointError(f"{path}: saved with {before}; go on in the same way, or choose another --out")
        if zero:
            torch.set_rng_state(state["random"])
            return int(state["step"])
        if state["weights"].keys() != parameters.keys():
            raise CheckpointError(f"{path}: it was saved with other trained weights; remove it to start anew")
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be resumed from ({error}); remove it to start anew") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["weights"][name])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return int(state["step"])


class _Told:
    stop = False


@contextmanager
def _told_to_stop() -> Iterator[_Told]:
    """Notes SIGTERM instead of dying of it, so that the step can end and the state be saved."""
    told = _Told()

    def note(*_: object) -> None:
        told.stop = True

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield told
        return
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
