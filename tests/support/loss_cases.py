"""Losses of a few lines, whose limits are known otherwise."""

import math

import torch
from torch import Tensor

from rl_ebm.studies.losses.flow import Field
from rl_ebm.studies.losses.visits import Alone, alone_of


def alone(flow: Field) -> Alone:
    """How each state moves by itself, of a flow whose states do not see each other."""
    found = alone_of(flow, flow.responses.start)
    assert found is not None
    return found


def top_two(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Reverse KL on the student's two likeliest tokens, as if there were no others."""
    best = student.topk(2, dim=-1).indices
    own, taught = (x.gather(-1, best).log_softmax(-1) for x in (student, teacher))
    return ((own.exp() * (own - taught)).sum(-1) * mask).sum() / mask.sum()


def either_top_two(student: Tensor, teacher: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Jensen-Shannon on the two likeliest tokens of the student and of the teacher together."""
    seen = torch.zeros_like(student, dtype=torch.bool)
    for logits in (student, teacher):
        seen = seen.scatter(-1, logits.topk(2, dim=-1).indices, True)
    own, taught = (x.masked_fill(~seen, -1e4).log_softmax(-1) for x in (student, teacher))
    middle = torch.logaddexp(own, taught) - math.log(2)
    terms = [(x.exp() * (x - middle)).sum(-1) for x in (own, taught)]
    return (sum(terms) / 2 * mask).sum() / mask.sum()
