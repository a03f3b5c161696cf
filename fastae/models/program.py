"""The program of a model's training step, from its layers and its parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastae.bottlenecks import Contractive, Variational
from fastae.engine.program import Contraction, Dense, Module, Penalise, Program, Stage
from fastae.models.stages import dense_stage, each_hook_once, layer_reason, sample_stage, stages_of
from fastae.nn.dropout import HiddenDropout
from fastae.nn.log_likelihood import log_likelihood
from fastae.nn.tied_linear_act import TiedLinearAct


def program_of(model: Any, own_loss: str | None, called: str | None) -> Program:
    """Plain layers as they are, runs of other modules as islands of autograd, or the whole model as one island.

    own_loss: why the model's own loss has to be called, or None. called: why calling the model is not calling its
    layers one after the other, or None.
    """
    widths, trained = (model.kind, model.in_features, model.out_features), model.loss_parameter
    tied = [m.source for m in model.modules() if isinstance(m, TiedLinearAct)]  # of a layer that was replaced, too
    everything = tuple(dict.fromkeys(p for m in (model, *tied) for p in m.parameters()))

    def with_own_loss(reason: str) -> Program:
        return Program((Module("", model),), *widths, everything, reason)

    if own_loss is not None:
        return with_own_loss(own_loss)
    if trained is not None and (trained._backward_hooks or trained._post_accumulate_grad_hooks):
        return with_own_loss("a parameter of its likelihood has a hook")
    part = model.bottleneck
    more: dict[str, Any] = {"corrupt": model.corrupt if model.training else None, "loss_parameter": trained}
    if isinstance(part, Contractive):
        more["contraction"] = Contraction(part, encoder_layers(model))
    if part is not None and called is not None:
        return with_own_loss(called)  # which knows what is asked of the code
    if isinstance(part, Variational) and not model.training:
        return with_own_loss("in eval mode the code is not sampled")
    itself = model if log_likelihood(model.likelihood.name).mean is None else _Logits(model)
    whole = Program((Module("", itself),), *widths, everything, **more)
    if called is not None:
        return whole
    if part is None or isinstance(part, Contractive):
        stages = stages_of(model.named_layers())
    else:
        stages = stages_of(model.layers_in("encoder"))
        stages.append(_code(stages, model.features[-1], part))
        stages += stages_of(model.layers_in("decoder"))
    if not any(isinstance(stage, Module) for stage in stages):
        return Program(tuple(stages), *widths, **more)
    if each_hook_once(stages):
        return Program(tuple(stages), *widths, everything, **more)
    return whole if part is None else with_own_loss("a parameter with a hook is used twice")


def encoder_layers(model: Any) -> tuple[Dense, ...]:
    """The layers of an encoder whose Jacobian is asked for. Raises ValueError for one that is not plain."""
    made = list[Dense]()
    for layer in model.encoder:
        if type(layer) is HiddenDropout and not layer.p:
            continue
        if reason := layer_reason(layer):
            raise ValueError(
                f"{type(model).__name__}: encoder must be of plain layers beside a contractive code; {reason}"
            )
        made.append(dense_stage("", layer))
    return tuple(made)


def _code(stages: list[Stage], width: int, part: Any) -> Stage:
    return sample_stage(stages, width, part) if isinstance(part, Variational) else Penalise("code", width, part)


class _Logits(nn.Module):
    """A whole model as an island of a step, whose loss takes logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.model.logits(x)
        return made
