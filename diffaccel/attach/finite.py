"""A check of what attention layers give: no NaN, no infinity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from diffaccel.errors import ModelError

if TYPE_CHECKING:
    from diffaccel.attach.call import AttentionCall, Compute


def checked(call: AttentionCall, compute: Compute, step: int | None) -> Tensor:
    """Answers a call by `compute`, and checks the answer."""
    output = compute(call)
    check_finite(call, output, step)
    return output


def check_finite(call: AttentionCall, output: Tensor, step: int | None) -> None:
    """Raises ModelError where an output (B, N, H, D) has NaN or infinity; waits for the device.

    Rows of padding mean nothing and are not looked at.

    Args:
        call: What was asked.
        output: The answer.
        step: Of the run, None where unknown.
    """
    tokens = {"query": call.query, "key": call.key, "value": call.value}
    if call.mask is not None and not (call.is_cross_attention or call.is_text_part):
        valid = call.attached.state.padding_mask(call)
        if valid is not None:
            asked = call.asked(valid)
            tokens = {name: x[asked if name == "query" else valid] for name, x in tokens.items()}
            output = output[asked]
    if output.isfinite().all():
        return
    wrong = [name for name, x in tokens.items() if not x.isfinite().all()]
    cause = f"as its {' and '.join(wrong)} had" if wrong else "though query, key and value do not"
    remedy = (
        "look at the layers before it" if wrong else "try bf16 or fp32, or diffaccel.FullAttn()"
    )
    at = "outside of a run" if step is None else f"at step {step}"
    raise ModelError(
        f"attention of {call.layer.name} has NaN or infinity in its output {at}, {cause}; {remedy}"
    )
