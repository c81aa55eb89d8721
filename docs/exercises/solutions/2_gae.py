"""A solution of exercise 2: the sum unrolled from its end, A_t = delta_t + gamma lam A_(t+1)."""

import torch


def gae(reward, value, mask, gamma, lam):
    adv = torch.zeros_like(reward)
    for b in range(len(reward)):
        next_adv = next_value = 0.0  # after the last token comes nothing
        for t in reversed(range(reward.shape[1])):
            if mask[b, t]:
                delta = reward[b, t] + gamma * next_value - value[b, t]
                adv[b, t] = next_adv = delta + gamma * lam * next_adv
                next_value = value[b, t]
    return adv
