"""Exercise 4: a sampler that reads every token once.

    make exercise N=4

To write token after token, a model needs the keys and values of all tokens so far. A cache keeps them, so that each
token passes through the model once: the prompt in one pass, then one token at a time. One prompt, one row:

    cache = KVCache(llama.config, 1, S, llama.device, torch.float32)   room for S = len(prompt) + max_new_tokens
    h = llama.prefill(tokens, None, cache, i)   (1, T) -> (n, C)   of n indices i; the prompt is in columns 0 to T - 1
    cache.length[:] = T                         yours to set: how many tokens the cache holds
    h = llama.decode(token, None, cache)        (1,) -> (1, C)     one token, stored in column cache.length, which grows
    llama.logits(h)                             (1, C) -> (1, V)   of the token that comes next

The next token is the likeliest (u is None), or drawn by inverting the cumulative distribution: with a number u from 0
to 1, one for each step, the first token i for which p_0 + ... + p_i is greater than u. Worked example:
p = (0.2, 0.5, 0.3) and u = 0.2 give token 1, since 0.2 is not greater than 0.2, and 0.7 is.

Stop after a token of `llama.config.eos_token_id` (a tuple), which belongs to the answer, or after max_new_tokens. Do
not run the model for a token that nobody will see. Where to look: `model.KVCache`; and, when done, `model.sample`,
which does all this for many ragged rows at once.
"""

import torch

from model import KVCache


@torch.no_grad()
def generate(llama, prompt, max_new_tokens, u=None):
    """prompt: list of at least two ids; u: None, or a list of max_new_tokens numbers. Returns the list of new ids."""
    cache = KVCache(llama.config, 1, len(prompt) + max_new_tokens, llama.device, torch.float32)
    raise NotImplementedError
