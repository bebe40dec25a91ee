"""What a loss that somebody wrote converges to, exactly: :func:`rl_ebm.audit_loss`.

A loss sees nothing but log-probabilities. Given those of every response, its own gradient says how
it moves each; weighed by the law that draws, that is the expected gradient, with one logit for
each state and action: no network, no noise, no closed form.
"""
