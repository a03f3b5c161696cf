"""`StaticStep`: loss and gradients of a program on static memory: one step without optimizer, graph or processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from fastae_kernels.ops import Criterion, Ops
from fastae_kernels.reference import TORCH
from fastae_kernels.sampling import Penalty
from torch import Tensor

from fastae.engine import schedule
from fastae.engine.call_list import Call, Recorder
from fastae.engine.draws import At
from fastae.engine.parameters import StepParameters
from fastae.engine.penalties import PenaltyStage, add_contraction
from fastae.engine.program import Dense, Module, Penalise, Program, Sample, layer_of
from fastae.engine.randomness import Randomness
from fastae.engine.sample_stage import SampleStage
from fastae.engine.stages import BoundStage, DenseStage, ModuleStage, Place, Scale, run
from fastae.nn.backend import DeviceSpec, decide, ops

logger = logging.getLogger(__name__)

Wrap = Callable[[Ops, str], Ops]
Choice = tuple[str, str]  # backend, and why
Variant = tuple[bool, bool]  # whether there is a target that is not x, and whether rows have weights


def choices(program: Program, like: Tensor | DeviceSpec, rows: int) -> list[Choice]:
    """(backend, why) of every stage, for that many rows like `like`; the loss is taken of the last."""
    found: list[Choice] = []
    for stage in program.stages:
        layer = layer_of(stage)
        if isinstance(stage, Penalise):
            found.append((found[-1][0], "a penalty on the code, by autograd"))
            continue
        if layer is None:
            why = "a module of its own, by autograd" if isinstance(stage, Module) else "a code from a module of its own"
            found.append(("torch", why))
            continue
        width, out = layer.widths
        found.append(decide(like, width, rows * width * out, stage is program.stages[-1]))
    return found


class StaticStep:
    """The step of a program for up to `rows` rows in `dtype`; its memory is allocated once.

    `load` brings rows into its memory, `run` computes their loss and puts the gradients into `.grad` and `gradients`.

    Args:
        program: what the model handed over.
        rows: the most rows of a step.
        dtype: to compute in.
        chosen: the backend of every stage and why; by default what the dispatch chooses.
        wrap: makes another implementation of a stage's ops from its name; `explain` and `profile` record by it.
    """

    def __init__(
        self,
        program: Program,
        rows: int,
        dtype: torch.dtype,
        chosen: Sequence[Choice] | None = None,
        wrap: Wrap | None = None,
    ) -> None:
        self.program, self.rows, self.dtype, self._wrap = program, rows, dtype, wrap
        like = _parameter_of(program)
        self.device, own = like.device, like.dtype
        self.choices = list(chosen or choices(program, like.new_empty(0, dtype=dtype), rows))
        backends = {backend for backend, _ in self.choices}
        self.parameters = StepParameters(program, dtype, backends == {"triton"})
        self._sums = ops("triton") if "triton" in backends else TORCH
        self._sums = self._sums if wrap is None else wrap(self._sums, "")
        self.stages = self._bound(own)
        self.gradients: Sequence[Tensor | None] = []
        self.hidden_grad = any(any(stage.needs) for stage in self.stages[:-1])
        features = program.out_features if self.parameters.padded else None
        self._criterion = Criterion(
            program.kind, features=features, share=program.share, parameter=self.parameters.loss
        )
        self._apart: Callable[[Callable[[], object]], None] = run
        self.random = Randomness(program, self.choices, self.device) if program.random else None
        self.repeats = backends == {"torch"} and self.device.type == "cpu" and program.own_loss is None
        self._in_numbers = self.device.type == "cpu" and "triton" not in backends  # the scale is a host number
        self.memory = Memory(self, rows)
        self._slices = {rows: self.memory}

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that get a gradient, in the order of `gradients`."""
        return self.parameters.trainable

    def _bound(self, own: torch.dtype) -> list[BoundStage]:
        made, dense, needed = list[BoundStage](), 0, False
        for stage, (backend, _) in zip(self.program.stages, self.choices, strict=True):
            chosen = ops(backend) if self._wrap is None else self._wrap(ops(backend), stage.name)
            layer, p = layer_of(stage), self.parameters
            if isinstance(stage, Dense):
                memory = p.weights[dense], p.biases[dense], stage.activation, p.needs[dense], p.places[dense]
                made.append(DenseStage(chosen, *memory, stage.name, stage.dropout))
            elif isinstance(stage, Sample):
                code = SampleStage(chosen, stage.part, stage.width, name=stage.name)
                if layer is not None:
                    code.w, code.b, code.needs, code.out = (
                        p.weights[dense], p.biases[dense], p.needs[dense], p.places[dense]
                    )  # fmt: skip
                made.append(code)
            elif isinstance(stage, Penalise):
                made.append(PenaltyStage(chosen, stage.part, stage.width, name=stage.name))
            else:
                wants = any(q.requires_grad for q in self.program.parameters)
                cast = None if own == self.dtype else self.dtype
                made.append(ModuleStage(chosen, stage.module, (wants, False), needed, cast, stage.name))
            dense += layer is not None
            needed = needed or any(made[-1].needs)
        return made

    def slice(self, count: int) -> Memory:
        """The memory of the first `count` rows."""
        if count not in self._slices:
            self._slices[count] = Memory(self, count, self.memory)
        return self._slices[count]

    def load(
        self,
        x: Tensor,
        rows: Tensor | None,
        target: Tensor | None,
        count: int,
        weight: Tensor | None = None,
        at: At = (0, 0, 0),
    ) -> Memory:
        """Bring x [M, in_features], or x[rows], the target and the rows' weights [M] into memory; x itself is the
        target if it is None, and every weight 1. `at` says which random numbers the step has."""
        memory = self._slices.get(count) or self.slice(count)
        corrupt = self.program.corrupt
        if self.random is not None:
            self.random.begin(at, memory.places)
        if corrupt is not None and self.random is not None:
            clean = memory.target()[:, : self.program.out_features] if target is None else None
            self.random.gather(x, rows, memory.given, clean)
        elif rows is not None and x.dtype == memory.given.dtype:
            torch.index_select(x, 0, rows, out=memory.given)
        else:
            TORCH.gather(x, rows, memory.given)
        if target is not None:
            TORCH.gather(target, rows, memory.target()[:, : self.program.out_features])
        if weight is not None:
            TORCH.gather(weight, rows, memory.weight())
        memory.variant = target is not None or corrupt is not None, weight is not None
        return memory

    def run(self, memory: Memory) -> Tensor:
        """The loss of what `load` brought, [] in fp32 (fp64 for fp64); the gradients go to `.grad`."""
        if self.parameters.by_autograd:
            self.parameters.begin()
        recorded = memory.recorded.get(memory.variant)
        if recorded is not None:
            for call in recorded:
                call()
        elif self.repeats:
            recorder = self.record(memory, Recorder())
            self.repeats = recorder.repeatable
            if recorder.repeatable:
                memory.recorded[memory.variant] = recorder.calls
        else:
            self.compute(memory)
        self.publish(memory)
        return memory.found[memory.variant].loss

    def publish(self, memory: Memory) -> None:
        """Put the gradients of the last step on this memory into `.grad`."""
        self.gradients = self.parameters.publish(memory.found[memory.variant].gradients)

    def record(self, memory: Memory, recorder: Recorder) -> Recorder:
        """Compute once and note the calls."""
        islands = [stage for stage in self.stages if isinstance(stage, ModuleStage | PenaltyStage)]
        self._apart = recorder.apart
        for stage in islands:
            stage.apart = recorder.apart
        with recorder:
            self.compute(memory)
        self._apart = run
        for stage in islands:
            stage.apart = run
        return recorder

    def compute(self, memory: Memory) -> None:
        """Loss and gradients, as recorded or captured."""
        if self.program.own_loss is not None:
            self._by_autograd(memory)
            return
        self.parameters.refresh(self._sums)
        has_target, has_weight = memory.variant
        target = memory.target() if has_target else memory.x
        criterion = self._criterion._replace(row_weight=memory.weight()) if has_weight else self._criterion
        for place in memory.places:
            place.row_weight = criterion.row_weight
        state = schedule.forward(
            self.stages, memory.x, target, criterion, memory.places, self.hidden_grad, defer_loss=True
        )
        scale = memory.scale
        if scale is None and memory.factor is not None:
            state.dp.mul_(memory.factor)
        _, grads = schedule.backward(state, self.stages, memory.places, scale, self._sums)
        if self.parameters.dloss is not None and memory.factor is not None:
            self.parameters.dloss.mul_(memory.factor if scale is None else scale)
        dense = [grad for grad, stage in zip(grads, self.program.stages, strict=True) if layer_of(stage) is not None]
        gradients = self.parameters.collect(dense)
        raised = next((k.penalty for k in state.kept if k.penalty is not None), None)
        if self.program.contraction is not None:
            raised = self._contract(memory, criterion.row_weight, gradients, state.loss)
        kl = next((k.kl for k in state.kept if k.kl is not None), None)
        memory.found[memory.variant] = Found(gradients, state.loss, kl, raised)

    def _contract(
        self, memory: Memory, row_weight: Tensor | None, gradients: Sequence[Tensor], loss: Tensor
    ) -> Penalty:  # fmt: skip
        """Add what the program's contraction raises the loss and the gradients by."""
        of, value = self.program.contraction, loss.new_empty(1)
        assert of is not None
        places: dict[Tensor, Tensor] = dict(zip(self.trainable, gradients, strict=False))
        self._apart(lambda: add_contraction(of, memory.given, row_weight, places, value))
        loss.add_(value.view(()), alpha=1 / memory.count)
        return Penalty(value)

    def _by_autograd(self, memory: Memory) -> None:
        """The model's own loss."""
        (stage,) = self.program.stages
        assert isinstance(stage, Module)
        cast = nullcontext() if memory.x.dtype == self.dtype else torch.autocast(self.device.type, self.dtype)
        given = (memory.given, memory.target()) if memory.variant[0] else (memory.given,)
        with torch.enable_grad(), cast:
            loss = stage.module.loss(*given)  # type: ignore[operator]
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"TrainStep: the model's loss must be a scalar tensor that depends on its parameters; got {loss!r}"
            )
        loss.backward()
        value = memory.places[-1].loss
        assert value is not None
        memory.found[memory.variant] = Found([], value.copy_(loss.detach().reshape(())))


class Found(NamedTuple):
    """What a step leaves: the gradients of the layers' parameters, the loss [], partial sums of the rows' divergence in
    a variational code, and what the loss was raised by."""

    gradients: list[Tensor]
    loss: Tensor
    kl: Tensor | None = None
    penalty: Penalty | None = None


class Memory:
    """Buffers that a step on `count` rows reads and writes; `full` is the memory whose first rows it shares.

    recorded, found: the calls, and what they leave, by variant.
    """

    def __init__(self, step: StaticStep, count: int, full: Memory | None = None) -> None:
        program, stages = step.program, step.stages
        like = _parameter_of(program)
        dtype = step.dtype if program.own_loss is None else like.dtype  # which autocast brings into the step's
        wide = torch.promote_types(dtype, torch.float32)
        half_on_cpu = step.device.type == "cpu" and dtype.itemsize == 2

        def rows(width: int, of: Tensor | None, dtype: torch.dtype = dtype) -> Tensor:
            if of is not None:
                return of[:count]
            # Zeros: what lies past the rows of a partial batch is read and multiplied by 0 where oneDNN has AMX
            return (like.new_zeros if half_on_cpu else like.new_empty)((count, width), dtype=dtype)

        self.count, self.variant = count, (False, False)
        width, self._width = program.in_features, program.out_features
        if step.parameters.padded:
            width, self._width = step.parameters.weights[0].shape[1], step.parameters.weights[-1].shape[0]
        self.x: Tensor = rows(width, None if full is None else full.x)
        self.given = self.x[:, : program.in_features]  # the columns that rows are gathered into
        self.x[:, program.in_features :] = 0
        self._target: Tensor | None = None
        self._weight: Tensor | None = None
        self.recorded: dict[Variant, list[Call]] = {}
        self.found: dict[Variant, Found] = {}
        self.places: list[Place] = []
        last = len(stages) - 1
        for i, stage in enumerate(stages):
            island, of = isinstance(stage, ModuleStage), Place() if full is None else full.places[i]
            width = self._width_after(step, i)
            place = Place(dp=rows(width, of.dp, wide if island and i == last else dtype))
            if (i < last or island) and not isinstance(stage, PenaltyStage):
                place.y = rows(width, of.y, wide if island and i == last else dtype)
            if isinstance(stage, DenseStage) and i < last and stage.saves == "p":
                place.p = rows(width, of.p)
            if isinstance(stage, SampleStage):
                place.y, place.p = rows(self._width_before(step, i + 1), of.y), rows(width, of.p)
            if i == last:
                place.loss, place.dparameter = like.new_empty((), dtype=wide), step.parameters.dloss
                if not island and half_on_cpu:
                    place.scratch = rows(width, of.scratch, torch.float32)
            self.places.append(place)
        # Each weight gradient puts the scale in: from memory, in a kernel's epilogue, or as a number, which keeps the
        # small numbers of half precision. The twins multiply fp32 once. A last island has true gradients.
        self.factor: float | None = program.kind.scale(count, program.out_features) / program.share
        if step.random is not None:
            step.random.provide(self.places, count)
        self.scale: Scale = None
        if isinstance(stages[-1], ModuleStage):
            self.factor = None
        elif not step._in_numbers:
            self.scale = torch.full((), self.factor, dtype=wide, device=step.device)
        elif dtype.itemsize == 2:
            self.scale = self.factor
        for place in self.places:
            place.unit = 1.0 if self.scale is None else self.factor or 1.0

    @staticmethod
    def _width_after(step: StaticStep, i: int) -> int:
        stage = step.stages[i]
        if isinstance(stage, DenseStage):
            return stage.w.shape[0]
        if isinstance(stage, SampleStage):
            return 2 * stage.width if stage.w is None else stage.w.shape[0]
        return step.program.out_features if i == len(step.stages) - 1 else Memory._width_before(step, i + 1)

    @staticmethod
    def _width_before(step: StaticStep, i: int) -> int:
        """The width that a stage takes."""
        stage = step.stages[i]
        if isinstance(stage, DenseStage):
            return stage.w.shape[1]
        if isinstance(stage, SampleStage):
            return 2 * stage.width if stage.w is None else stage.w.shape[1]
        if isinstance(stage, PenaltyStage):
            return stage.width
        below = step.stages[i - 1]
        assert isinstance(below, DenseStage | SampleStage | PenaltyStage), "islands that meet are one"
        return below.w.shape[0] if isinstance(below, DenseStage) else below.width

    def target(self) -> Tensor:
        """The buffer of a target that is not x, made when it is first asked for."""
        if self._target is None:
            self._target = self.x.new_zeros(self.count, self._width)
        return self._target

    def weight(self) -> Tensor:
        """The buffer of the rows' weights, made when it is first asked for: fp32, or fp64 for fp64."""
        if self._weight is None:
            self._weight = self.x.new_zeros(self.count, dtype=torch.promote_types(self.x.dtype, torch.float32))
        return self._weight


def _parameter_of(program: Program) -> Tensor:
    """One that tells device and dtype."""
    for stage in program.stages:
        if (layer := layer_of(stage)) is not None:
            return layer.weight
        for p in stage.module.parameters() if isinstance(stage, Module) else ():
            if p.is_floating_point():
                return p
    raise ValueError("TrainStep: model must have parameters; got none")
