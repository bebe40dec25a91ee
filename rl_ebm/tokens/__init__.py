"""Token sequences: the space of them, batches of them, and prompts.

Notation, used in the whole library:

====================  ===================================================  ======================
symbol                meaning                                              shape, unit
====================  ===================================================  ======================
``A``                 number of actions: the vocabulary, with EOS if any
``T``                 ``max_length``; in EOS mode it counts the EOS
``tokens``            responses y, padded; unread past ``lengths``         (B, T) int64
``lengths``           real tokens of each row, EOS included                (B,) int64
``prompts``           the P prompts x, int sequences; without any, P = 1
``prompt_ids``        which prompt each row answers                        (B,) int64
``reward``            R(x, y), terminal, higher is better                  (B,) reward units
``beta``              temperature of the KL penalty, > 0                   reward units per nat
``log_ref``           log p_ref(a|s); without a reference 0 everywhere     (B, T, A) nats
``r``                 log_ref, plus R / beta on the last action            (B, T, A) nats
``q``, ``logits``     action values, before the action: q[:, t] scores     (B, T, A) nats
                      tokens[:, t]
``v``                 V(s) = logsumexp over a of q(s, a); V(end) = 0       (B, T) nats
``log_pi``            q - v                                                (B, T, A) nats
``log_z``             log Z(x) = V(x), the root's v                        (P,) nats
====================  ===================================================  ======================

Tokens, lengths and prompt ids are taken as integers of any size, and become int64.

Logits are defined up to a constant for each state, rewards up to one for each prompt: compare them
centred, or through log_pi. ``-inf`` is a legal log-weight: what is forbidden or impossible.
"""

from rl_ebm.tokens.space import Batch, TokenSpace, check_space, length_mask

__all__ = ["Batch", "TokenSpace", "check_space", "length_mask"]
