"""Shared prompts: a prompt that several rows of a batch have passes through the model once.

The reward stage trains on six rows of each prompt, and the prompt is their longest part. A group of rows is laid out as
one row, prompt first, with positions that restart after it:

    tokens      p0 p1 p2   a0 a1   b0 b1 b2   padding
    positions    0  1  2    3  4    3  4  5
    b1 sees     p0 p1 p2           b0 b1

Every response sees the prompt and itself: its states are those that it has in a row of its own (--no-share-prompts,
the plain equivalent). Rows that are to share a pass must be in one batch: `data.epochs` composes such batches.

Dimensions: B rows, G groups, S tokens of the longest group, P of the shortest prompt, n response tokens of all rows.
"""

from dataclasses import dataclass

import torch

from data import layout_length, same_prompt


@dataclass(frozen=True)
class SharedPrompts:
    """The rows of a batch in groups, each of which reads `prompt, response, response, …, padding`."""

    tokens: torch.Tensor  # (G, S) long
    positions: torch.Tensor  # (G, S) long: of a token in its row
    visible: torch.Tensor  # (G, 1, S - P, S) bool: which keys are seen by the queries beyond the shortest prompt, P
    indices: torch.Tensor  # (n,) long: where the rows' response tokens are in the flattened (G S), row by row
    before: torch.Tensor  # (n,) long: where the state is from which each of them was chosen

    def mask(self, dtype):
        """What attention adds to the scores: (G, 1, S - P, S), 0 where a key is seen, else minus infinity."""
        zeros = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
        return zeros.masked_fill_(~self.visible, -torch.inf)


def lay_out(batch):
    """The SharedPrompts of a data.Batch."""
    rows = batch.rows
    groups = same_prompt(rows, range(len(rows)))
    G = len(groups)
    S = max(layout_length(rows, group) for group in groups)
    tokens = torch.zeros(G, S, dtype=torch.long)
    positions = torch.zeros(G, S, dtype=torch.long)
    part = torch.zeros(G, S, dtype=torch.long)  # 0: prompt, 1, 2, …: which of the group's responses
    indices, before = [None] * len(rows), [None] * len(rows)
    for g, group in enumerate(groups):
        prompt = rows[group[0]].prompt
        P = len(prompt)
        tokens[g, :P] = torch.tensor(prompt)
        positions[g, :P] = torch.arange(P)
        start = P
        for n, b in enumerate(group, 1):
            response = rows[b].response
            end = start + len(response)
            tokens[g, start:end] = torch.tensor(response)
            positions[g, start:end] = torch.arange(P, P + len(response))
            part[g, start:end] = n
            indices[b] = torch.arange(g * S + start, g * S + end)
            before[b] = indices[b] - 1
            before[b][0] = g * S + P - 1  # the last token of the prompt, which all of the group's responses follow
            start = end
    column = torch.arange(S)
    P = min(len(rows[group[0]].prompt) for group in groups)
    causal = column[P:, None] >= column  # (S - P, S)
    query, key = part[:, P:, None], part[:, None, :]
    visible = causal & ((key == 0) | (key == query))  # (G, S - P, S); padding is a prompt that nobody sees
    tensors = [tokens, positions, visible[:, None], torch.cat(indices), torch.cat(before)]
    return SharedPrompts(*[tensor.to(batch.tokens.device) for tensor in tensors])
