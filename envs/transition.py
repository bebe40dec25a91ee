r"""The token MDP of an EBM as one step on a batch of rows: the rules of both environments.

The rules themselves (what is allowed, executed as EOS, or ends a response) are the methods of
:class:`rl_ebm.TokenSpace` that the sampler uses. Rewards are in reward units:

    terminal:  0, and R(x, y) on the last action                                       (1)
    soft:      beta * log p_ref(a|s), plus R(x, y) on the last action: beta * r          (2)

A response's soft rewards sum to R(x, y) + beta * log p_ref(y|x): beta times its log-weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from rl_ebm.automata.weights import check_values
from rl_ebm.ebm import EBM, check_ebm
from rl_ebm.messages.arguments import Number, finite, shown
from rl_ebm.policies.base import forbids_of

REWARD_MODES = ("terminal", "soft")

NEEDS_FORBIDDEN_REWARD = (
    "some responses or actions of this EBM have log-weight -inf, and an environment pays finite "
    "rewards only: give forbidden_reward=, the finite number that a step pays in place of -inf"
)


@dataclass(frozen=True)
class State:
    """Responses as far as they are written. A step makes a new one; nothing is written into it."""

    tokens: Int64[Tensor, "B T"]
    """0 past ``lengths``"""
    lengths: Int64[Tensor, "B"]
    """tokens written so far, 0 to T"""
    prompt_ids: Int64[Tensor, "B"]
    ended: Bool[Tensor, "B"]
    """True where the response is complete"""
    log_ref: Float64[Tensor, "B A"] | None
    """log p_ref of the next token (anything where ended), in nats; None where nothing reads it"""


class Transition:
    """Steps a batch of rows of an EBM's token MDP, on the EBM's device.

    Args:
        ebm: the EBM.
        reward_mode: "terminal" or "soft"; Eqs. (1) and (2) of the module.
        forbidden_reward: a finite number in reward units, paid by a step whose reward would be
            ``-inf``; None where there is no such step.

    Raises:
        ValueError: an unknown mode; a forbidden reward that is not finite, or none where the
            EBM is known to pay ``-inf`` in this mode.
    """

    def __init__(
        self, ebm: EBM, reward_mode: str = "terminal", forbidden_reward: Number | None = None
    ) -> None:
        check_ebm(ebm)
        if not (isinstance(reward_mode, str) and reward_mode in REWARD_MODES):
            nearest = get_close_matches(str(reward_mode)[:80], REWARD_MODES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"reward_mode must be one of {', '.join(REWARD_MODES)}, got {shown(reward_mode)}; "
                f"did you mean {nearest!r}?"
            )
        if forbidden_reward is not None:
            forbidden_reward = finite("forbidden_reward", forbidden_reward)
        pays_log_ref = reward_mode == "soft" and ebm.reference is not None
        known_to_forbid = ebm.forbids if pays_log_ref else ebm.reward_model.forbids
        if known_to_forbid and forbidden_reward is None:
            raise ValueError(NEEDS_FORBIDDEN_REWARD)
        self.ebm = ebm
        self.forbidden_reward = forbidden_reward
        self._pays_log_ref = pays_log_ref
        # A reference that says it forbids nothing need not be asked for masks.
        may_forbid = forbids_of(ebm.reference) is not False
        self._reads_reference = pays_log_ref or (ebm.reference is not None and may_forbid)

    def start(self, prompt_ids: Int64[Tensor, "B"]) -> State:
        """Empty responses to these prompts (0 everywhere without prompts)."""
        prompt_ids = prompt_ids.to(self.ebm.device)
        n = len(prompt_ids)
        tokens = torch.zeros(
            n, self.ebm.space.max_length, dtype=torch.int64, device=self.ebm.device
        )
        lengths = torch.zeros_like(prompt_ids)
        ended = torch.zeros_like(prompt_ids, dtype=torch.bool)
        return State(tokens, lengths, prompt_ids, ended, self._log_ref(tokens, lengths, prompt_ids))

    @torch.no_grad()
    def step(
        self,
        state: State,
        actions: Int64[Tensor, "B"],
        next_prompt_ids: Int64[Tensor, "B"] | None = None,
    ) -> tuple[State, Float64[Tensor, "B"], Bool[Tensor, "B"]]:
        """Append one token to every running row; a row that has ended begins anew.

        A row that begins anew ignores its action and pays 0.

        Args:
            state: from :meth:`start` or :meth:`step`.
            actions: token ids in [0, A), on the EBM's device.
            next_prompt_ids: the prompts of the rows that begin anew, read nowhere else; None
                keeps those they have.

        Returns:
            The next state; the rewards; and True where EOS was executed in the action's place.

        Raises:
            ValueError: a reward is NaN or +inf, or ``-inf`` without a ``forbidden_reward``.
        """
        space, running = self.ebm.space, ~state.ended
        t = _position(state, space.max_length)
        replaced = running & space.replaces(actions, t)
        if space.eos_id is not None:
            actions = actions.masked_fill(replaced, space.eos_id)
        ended = running & space.ends(actions, t)
        tokens = state.tokens.scatter(1, t[:, None], actions[:, None])
        tokens = tokens.masked_fill(state.ended[:, None], 0)
        lengths = (state.lengths + 1).masked_fill(state.ended, 0)
        prompt_ids = state.prompt_ids
        if next_prompt_ids is not None:
            prompt_ids = torch.where(state.ended, next_prompt_ids, prompt_ids)

        reward = torch.zeros(len(actions), dtype=torch.float64, device=actions.device)
        if self._pays_log_ref:
            assert state.log_ref is not None, "soft rewards read the reference at every state"
            paid = self.ebm.beta * state.log_ref.gather(1, actions[:, None])[:, 0]
            reward = paid.masked_fill(state.ended, 0.0)
        # Only complete responses have a reward; often no row has just been completed.
        rows = ended.nonzero()[:, 0]
        if len(rows):
            terminal = self.ebm.reward(tokens[rows], lengths[rows], prompt_ids[rows])
            reward = reward.index_add(0, rows, terminal.double())
        after = State(
            tokens, lengths, prompt_ids, ended, self._log_ref(tokens, lengths, prompt_ids)
        )
        return after, self._finite(reward), replaced

    def action_mask(self, state: State) -> Bool[Tensor, "B A"]:
        """True where neither the space nor log p_ref forbids the next action.

        True everywhere in a row that has ended: its action is ignored, and a masked softmax over
        it stays finite.
        """
        space = self.ebm.space
        mask = space.action_mask(self.ebm.device)[_position(state, space.max_length)]
        if state.log_ref is not None:
            mask = mask & ~torch.isneginf(state.log_ref)
        return mask | state.ended[:, None]

    def _finite(self, reward: Float64[Tensor, "B"]) -> Float64[Tensor, "B"]:
        check_values(reward, "the reward of a step")
        forbidden = torch.isneginf(reward)
        if self.forbidden_reward is not None:
            return reward.masked_fill(forbidden, self.forbidden_reward)
        if bool(forbidden.any()):
            raise ValueError(NEEDS_FORBIDDEN_REWARD)
        return reward

    def _log_ref(
        self,
        tokens: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, "B"],
        prompt_ids: Int64[Tensor, "B"],
    ) -> Float64[Tensor, "B A"] | None:
        if not self._reads_reference:
            return None
        rows = self.ebm.log_ref_rows(tokens, prompt_ids)
        last = self.ebm.space.max_length - 1
        return rows[torch.arange(len(rows), device=rows.device), lengths.clamp(max=last)].double()


def _position(state: State, max_length: int) -> Int64[Tensor, "B"]:
    """Where the next token goes; a legal place also where the response is complete."""
    return state.lengths.clamp(max=max_length - 1)
