"""Exercise 2: generalized advantage estimation, equation 2 of the paper.

    make exercise N=2

An advantage says how much better things went, from a token on, than the value had promised:

    delta_t = r_t + gamma V_(t+1) - V_t                          the surprise at token t
    A_t     = sum over t' >= t of (gamma lam)^(t' - t) delta_t'  all surprises from here on, the far ones fading

Column t belongs to token t: `reward[b, t]` is what token t brought, `value[b, t]` the value of the state before it, and
V_(t+1) stands in the next column. Worked example, gamma = 1 and lam = 1/2, one row of two response tokens:

    mask    0      1      1      0
    reward  9      1      2      9      the 9s lie outside the mask: they must not matter
    value   9      1/2    1      9
    delta          3/2    1             1 + 1 - 1/2, and 2 + 0 - 1: after the last token there is no value
    adv     0      2      1      0      3/2 + 1/2 x 1

Loops are welcome: two of them, over rows and backwards over columns, do it in ten lines. Where to look: the paper's
sum is quoted in the README, the columns are drawn at the top of ppo.py. Leave `ppo.gae` closed until you are done.
"""

import torch


def gae(reward, value, mask, gamma, lam):
    """reward, value (B, T) float, mask (B, T) bool -> (B, T) float, 0 outside the mask."""
    adv = torch.zeros_like(reward)
    raise NotImplementedError
