"""`TRITON`: the kernels as one implementation of every op."""

from __future__ import annotations

from fastae_kernels.jit.gather import gather
from fastae_kernels.jit.linear_act import act_bwd, linear_act_fwd, linear_dgrad_act, linear_wgrad
from fastae_kernels.jit.linear_act_loss import decoder_loss, fits_decoder, linear_act_loss
from fastae_kernels.jit.losses import loss
from fastae_kernels.jit.sampling import linear_dgrad_sample, linear_sample
from fastae_kernels.jit.stack import fits_stack, stack_encode, stack_score
from fastae_kernels.jit.sums import sum_partials
from fastae_kernels.ops import Ops


class Jit:
    """The launchers of the kernels; `Ops` says what they compute."""

    linear_act_fwd = staticmethod(linear_act_fwd)
    act_bwd = staticmethod(act_bwd)
    linear_dgrad_act = staticmethod(linear_dgrad_act)
    linear_wgrad = staticmethod(linear_wgrad)
    linear_sample = staticmethod(linear_sample)
    linear_dgrad_sample = staticmethod(linear_dgrad_sample)
    loss = staticmethod(loss)
    linear_act_loss = staticmethod(linear_act_loss)
    decoder_loss = staticmethod(decoder_loss)
    stack_score = staticmethod(stack_score)
    stack_encode = staticmethod(stack_encode)
    sum_partials = staticmethod(sum_partials)
    gather = staticmethod(gather)
    fits_decoder = staticmethod(fits_decoder)
    fits_stack = staticmethod(fits_stack)


TRITON: Ops = Jit()
