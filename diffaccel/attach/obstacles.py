"""Why an attention call cannot go to a method, whatever the method is: one chain of reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from diffaccel.attach.context_parallel import holds_all, why_not_exchanged

if TYPE_CHECKING:
    from diffaccel.attach.call import AttentionCall


def obstacle(call: AttentionCall) -> str:
    """Returns the first reason why a call cannot go to a method, "" where it can."""
    reason = parallelism(call) or planned_obstacle(call)
    return reason or unsupported_mask(call) or skipped_scores(call)


def planned_obstacle(call: AttentionCall) -> str:
    """Returns the first reason that holds for the layer and the shape of a call, else ""."""
    return next(filter(None, (reason(call) for reason in PLANNED)), "")


def parallelism(call: AttentionCall) -> str:
    """Where tokens are split among ranks, they come here in exchange for heads, or not at all."""
    if call.attached.state.context is None or call.share is not None or holds_all(call):
        return ""
    return why_not_exchanged(call)


def unknown_layout(call: AttentionCall) -> str:
    """The model call has to tell what the tokens are, and all of them."""
    layout, length = call.layout, call.key.shape[1]
    if layout is None:
        return call.attached.state.why_no_layout(call.layer)
    if layout.length != length:
        return (
            f"the layout read from the model call has {layout.length} tokens, "
            f"the layer got {length}"
        )
    return ""


def unsupported_arguments(call: AttentionCall) -> str:
    """Methods compute softmax attention over key padding, head by head."""
    if call.options.get("dropout_p") or call.options.get("is_causal"):
        return "dropout and causal masks are not supported"
    return ""


def unsupported_mask(call: AttentionCall) -> str:
    """Of masks, methods know key padding."""
    if call.mask is None:
        return ""
    if not isinstance(call.mask, Tensor):
        return "a block mask of flex attention is not key padding"
    if call.attached.state.padding_mask(call) is None:
        return f"an attention mask of shape {tuple(call.mask.shape)} is not key padding"
    return ""


def skipped_scores(call: AttentionCall) -> str:
    """A guider of diffusers (perturbed attention) may replace SDPA around a call."""
    modes = _get_current_function_mode_stack()
    if any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes):
        return "a guider skips the attention scores of this call"
    return ""


PLANNED = (unknown_layout, unsupported_arguments)
