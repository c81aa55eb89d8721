"""A solution of exercise 4."""

import torch

from model import KVCache


@torch.no_grad()
def generate(llama, prompt, max_new_tokens, u=None):
    cache = KVCache(llama.config, 1, len(prompt) + max_new_tokens, llama.device, torch.float32)
    last = torch.tensor([len(prompt) - 1])
    h = llama.prefill(torch.tensor([prompt]), None, cache, last)  # (1, C)
    cache.length[:] = len(prompt)
    answer = []
    for i in range(max_new_tokens):
        if i > 0:
            h = llama.decode(torch.tensor(answer[-1:]), None, cache)  # (1, C)
        logits = llama.logits(h)[0]  # (V,)
        if u is None:
            token = logits.argmax().item()
        else:
            cdf = logits.softmax(0).cumsum(0)  # (V,)
            token = min((cdf <= u[i]).sum().item(), len(cdf) - 1)  # rounding may leave the last of cdf below u
        answer.append(token)
        if token in llama.config.eos_token_id:
            break
    return answer
