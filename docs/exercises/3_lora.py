"""Exercise 3: a LoRA layer, forwards and backwards.

    make exercise N=3

A frozen weight W and beside it a product of two thin matrices, which learns:

    y = x W + scaling (x Aᵀ) Bᵀ          x (M, K), W (K, N), A (R, K), B (N, R), scaling = alpha / r, y (M, N)

`backward` gets dy, the gradient of the loss by y, and returns those by x, A and B, without autograd. There is none by
W, which is frozen and may even be stored in 4 bits. The rule for a product P = X Y is dX = dP Yᵀ, dY = Xᵀ dP. Apply
it to both products of the low-rank term. Worked example, all sizes 1: x = 2, W = 3, A = 5, B = 7, scaling = 1/2:

    y  = 2 x 3 + 1/2 x 2 x 5 x 7 = 41
    dy = 1:   dx = 3 + 1/2 x 5 x 7 = 20.5    dA = 1/2 x 7 x 2 = 7    dB = 1/2 x 2 x 5 = 5

Careful with dx: the layers below learn through it, so it needs both terms. Where to look: `lora.LoRALinear.plus` is
the low-rank term as the engine has it, `quant.QuantMatmul.backward` what becomes of W in 4 bits.
"""


def forward(x, W, A, B, scaling):
    """-> y (M, N)."""
    raise NotImplementedError


def backward(dy, x, W, A, B, scaling):
    """-> dx (M, K), dA (R, K), dB (N, R)."""
    raise NotImplementedError
