"""Whether a model is still what a step was built for: compared once a step, in a few microseconds."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastae.engine.program import Module, Program, layer_of
from fastae.nn.dropout import HiddenDropout

CHOSEN = ("activation", "likelihood", "corrupt", "bottleneck", "p")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_hooks, _hooks_after = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")
_needs_grad, _dtype, _address, _stride = (
    attrgetter("requires_grad"),
    attrgetter("dtype"),
    Tensor.data_ptr,
    Tensor.stride,
)


class Signature:
    """Snapshot of all that a step depends on, taken when the step was built.

    Of parameters: which ones there are and where, their memory, strides, dtype, `requires_grad` and hooks. Of modules:
    class, children, hooks, attributes of the instance (a forward of its own), activation, parts, mode. Islands are
    called as they are, so of the modules inside them only the parameters are looked at; of the model itself, which may
    be one, all.
    """

    def __init__(self, model: nn.Module, program: Program) -> None:
        islands = {id(m) for stage in program.stages if isinstance(stage, Module) for m in stage.module.modules()}
        modules = list(model.modules())
        self._parameters = list(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
        layers = [layer for layer in map(layer_of, program.stages) if layer is not None]
        dense = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
        its = [] if program.loss_parameter is None else [program.loss_parameter]
        self._plain = list(dict.fromkeys([*dense, *its]))
        self._tables = [vars(m)[table] for m in modules for table in ("_parameters", "_modules")]
        self._modules = [m for m in modules if m is model or id(m) not in islands]
        self._attributes = list(map(vars, self._modules))
        self._hooks = [vars(m)[hooks] for m in self._modules for hooks in HOOKS]
        self._chosen = [(d, name) for d in self._attributes for name in CHOSEN if name in d]
        # the mode, of those that draw random numbers of the step's
        own = [m for m in self._modules if isinstance(m, HiddenDropout) or m is model]
        self._chosen += [(vars(m), "training") for m in own]
        # what they hold, and numbers that tell of a change
        self._held = list(chain.from_iterable(map(dict.values, self._tables)))
        self._types = list(map(type, self._modules))
        self._sizes = self._tables + self._attributes
        self._hooked, self._parameters_hooked = self._any_hook(), self._any_parameter_hook()
        self._was = self._numbers()

    def _numbers(self) -> tuple[object, ...]:
        parameters = self._parameters
        return (
            list(map(_address, parameters)),
            list(map(_stride, parameters)),
            list(map(_needs_grad, parameters)),
            parameters[0].dtype,  # of one: they change together, and where memory is replaced it is elsewhere
            list(map(len, self._sizes)),
            [d[name] for d, name in self._chosen],
        )

    def _any_hook(self) -> bool:
        return any(self._hooks) or _has_any_global_hook()

    def _any_parameter_hook(self) -> bool:
        return any(map(_hooks, self._plain)) or any(map(_hooks_after, self._plain))

    def holds(self) -> bool:
        """Whether nothing that the step depends on has changed."""
        return (
            self._numbers() == self._was
            and all(map(is_, chain.from_iterable(map(dict.values, self._tables)), self._held))
            and all(map(is_, map(type, self._modules), self._types))
            and self._any_hook() == self._hooked
            and self._any_parameter_hook() == self._parameters_hooked
        )
