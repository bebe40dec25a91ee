"""Terminal rewards R(x, y): a table, a Python function, a TRL reward, an automaton, a Transformer.

A reward is called as ``reward(tokens, lengths, prompt_ids) -> (B,)``; higher is better, ``-inf``
is an impossible response. It knows neither p_ref nor beta.
"""

from rl_ebm.automata.regex.pieces import alphabet_of
from rl_ebm.automata.weights import check_values
from rl_ebm.rewards.automaton import Automaton
from rl_ebm.rewards.base import Reward
from rl_ebm.rewards.checks import check
from rl_ebm.rewards.convert import as_reward
from rl_ebm.rewards.expression import KINDS, parse_reward, register
from rl_ebm.rewards.function import Function
from rl_ebm.rewards.table import Table
from rl_ebm.rewards.table_file import TableFile, read_table
from rl_ebm.rewards.transformer import TransformerReward
from rl_ebm.rewards.trl import TRLFunction, from_trl

__all__ = [
    "KINDS",
    "Automaton",
    "Function",
    "Reward",
    "TRLFunction",
    "Table",
    "TableFile",
    "TransformerReward",
    "alphabet_of",
    "as_reward",
    "check",
    "check_values",
    "from_trl",
    "parse_reward",
    "read_table",
    "register",
]
