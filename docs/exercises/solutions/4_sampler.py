"""A solution of exercise 4."""

import torch

from model import KVCache


@torch.no_grad()
def generate(llama, prompt, max_new_tokens, u=None):
    cache = KVCache(llama.config, 1, len(prompt) + max_new_tokens, llama.device, torch.float32)
    new, answer = prompt, []  # new: the tokens that the model has not read yet
    for i in range(max_new_tokens):
        h = llama(torch.tensor([new]), None, cache)  # (1, T, C)
        cache.length += len(new)
        logits = llama.logits(h[:, -1])[0]  # (V,)
        if u is None:
            token = logits.argmax().item()
        else:
            cdf = logits.softmax(0).cumsum(0)  # (V,)
            token = min((cdf <= u[i]).sum().item(), len(cdf) - 1)  # rounding may leave the last of cdf below u
        answer.append(token)
        if token in llama.config.eos_token_id:
            break
        new = [token]
    return answer
