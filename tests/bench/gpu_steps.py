"""The parts D, P and D3 of gpu.py: sampling, the PPO update and its memory, on a random 4-bit Llama-2-7B.

D1  tokens a second of decoding one row, over the roofline: all weights and the cache read once a token, at copy speed.
D2  sampling 7 x (400 + 100) at temperature 1, the whole call, over its floor: prefill's FLOPs at the speed of a large
    product, then weights and cache at copy speed.
D3  the same against transformers' generate (sdpa, dynamic cache) on the same weights, unpacked to bf16.
P1  lastmile.ppo_step on 7 x (400 + 100) given tokens over its floor: 3 forwards, 2 backwards to the input, LoRA and
    attention, as FLOPs at the speed of a large product.
P2  the same update as TRL 1.x and torchtune do it, on our kernels: base, value and reward without gradients, then
    policy and value with them, one after another, logits at every position.
P3  one pass of 21 x 500 tokens under three adapters, 7 rows each, over the bare base.
M1  peak memory allocated during P1, plain and with --grad-checkpoint.
"""

import common
import gpu_kernels
import steps
import torch
import torch.nn.functional as F

import data
import lastmile
import lora
import model
import ppo

B = 7


def random_llama(bench):
    """Llama-2-7B with random 4-bit projections, made on the device; tiny: 2 blocks of width 256."""
    C, F_, L = bench.C, bench.F, 2 if bench.tiny else 32
    V, H = (1024, 2) if bench.tiny else (32000, 32)
    config = model.LlamaConfig(V, C, F_, L, H, H, C // H, eos_token_id=(-1,))
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    with torch.device(bench.device):
        llama = model.Llama(config)
        common.pack_layers(llama, gpu_kernels.GROUP)
    torch.set_default_dtype(before)
    llama.model.embed_tokens.weight.data.normal_()
    for _, layer in lora.lora_layers(llama):
        base = layer.base
        gpu_kernels.fill(base, gpu_kernels.random_packed(base.in_features, base.out_features, bench.device))
    return llama.requires_grad_(False)


def weight_bytes(llama):
    """Bytes that every token must read: packed projections and the head; of the embeddings a row only."""
    layers = [layer.base for _, layer in lora.lora_layers(llama)]
    head = llama.lm_head.weight
    return sum(gpu_kernels.packed_bytes(b.in_features, b.out_features) for b in layers) + head.numel() * head.itemsize


def cache_bytes(llama, tokens):
    c = llama.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * llama.lm_head.weight.itemsize * tokens


def projection_flops(llama):
    """FLOPs of all projections for one token."""
    return sum(2 * layer.base.in_features * layer.base.out_features for _, layer in lora.lora_layers(llama))


def prompts_of(bench, llama):
    """B random prompts, and how many tokens each is to be continued by."""
    prompt, new = (16, 6) if bench.tiny else (400, 100)
    return [row.prompt for row in common.random_rows(B, prompt, new, llama.config.vocab_size)], new


def sampling(bench):
    llama = random_llama(bench)
    prompts, new = prompts_of(bench, llama)
    prompt = len(prompts[0])
    answers = model.sample(llama, prompts, None, new, 0)
    tokens = torch.tensor([p + a for p, a in zip(prompts, answers, strict=True)], device=bench.device)
    with torch.no_grad():  # bf16 near-ties may fall either way; a wrong cache agrees nowhere
        expected = llama.logits(llama(tokens)[:, prompt - 1 : -1]).argmax(-1)  # (B, new)
    agree = (expected == tokens[:, prompt:]).float().mean().item()
    assert agree > 0.7, f"greedy tokens agree with a pass over all of them in {agree:.0%} only"

    step_bytes = weight_bytes(llama) + cache_bytes(llama, prompt + new // 2)
    laps = bench.race({n: lambda n=n: model.sample(llama, prompts[:1], None, n, 0) for n in (1, new)}, seconds=20)
    rate = [(new - 1) / max(a - b, 1e-9) for a, b in zip(laps[new], laps[1], strict=True)]
    bench.line("D1", "batch-1 decode, tok/s", rate, laps=laps)
    bench.line("D1", "over the roofline", [r * step_bytes / bench.copy for r in rate], 0.50, 0.65)

    floor = projection_flops(llama) * B * prompt / bench.flops
    floor += (new - 1) * (weight_bytes(llama) + cache_bytes(llama, B * (prompt + new // 2))) / bench.copy
    laps = bench.race({"all": lambda: model.sample(llama, prompts, None, new, 1.0)}, seconds=15)["all"]
    bench.line("D2", f"sampling {B} x ({prompt} + {new}), s", laps, laps=laps)
    bench.line("D2", "over its floor", [t / floor for t in laps], 2.0, 1.4, least=False, unit="x")


def against_transformers(bench):
    try:
        import transformers
    except ImportError as error:
        print(f"D3: skipped, {error}", flush=True)
        return
    transformers.logging.set_verbosity_error()
    llama = random_llama(bench)
    (prompts, new), c = prompts_of(bench, llama), llama.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps")  # fmt: skip
    config = transformers.LlamaConfig(**{name: getattr(c, name) for name in names}, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    with torch.device(bench.device):
        theirs = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(before)
    layers = dict(lora.lora_layers(llama))
    for name, parameter in theirs.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        parameter.data.copy_(llama.get_parameter(name) if layer is None else layer.base.weight(bench.dtype).T)
    ids = torch.tensor(prompts, device=bench.device)
    with torch.no_grad():
        ours, expected = llama.logits(llama(ids)[:, -1]), theirs(ids).logits[:, -1].float()
    error = ((ours - expected).norm() / expected.norm()).item()
    assert error < 0.05, f"logits differ from transformers' by {error:.1e}"
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0
    )
    contestants = {
        "ours": lambda: model.sample(llama, prompts, None, new, 1.0),
        "theirs": lambda: theirs.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape),
                                          generation_config=settings),
    }  # fmt: skip
    laps = bench.race(contestants, seconds=40)
    ratio = [t / o for o, t in zip(laps["ours"], laps["theirs"], strict=True)]
    bench.line("D3", f"over transformers {transformers.__version__} generate", ratio, 8, 15, unit="x", laps=laps)


def update_flops(llama, T):
    """FLOPs that one PPO update cannot do without: see P1."""
    c, rows = llama.config, B * T
    attention = 4 * B * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T * T / 2  # causal: a half
    adapters = {
        name: 2 * sum(p.numel() for p in llama.adapter_parameters(name)) * rows
        for name in ("policy", "value", "reward")
    }
    base = projection_flops(llama) * rows
    forward = 3 * (base + attention) + sum(adapters.values())
    return forward + 2 * (base + 2.5 * attention) + 2 * (adapters["policy"] + adapters["value"])


def updates(bench):
    llama = random_llama(bench)
    prompt, new = (16, 6) if bench.tiny else (400, 100)
    s = steps.settings("ppo", device=bench.device, dtype=str(bench.dtype).removeprefix("torch."))
    steps.add_adapters("ppo", llama, s)
    batch = data.collate(common.random_rows(B, prompt, new, llama.config.vocab_size), bench.device)
    ours = steps.step("ppo", llama, batch, s)
    numbers = ours()
    assert numbers["ratio"] == 1 and numbers["grad_norm"] > 0, numbers
    for name, goal, stretch in (("plain", 38, 30), ("checkpointed", 13, 11)):
        llama.recompute = name == "checkpointed"
        laps, peaks = zip(*(peak_of(bench, ours) for _ in range(3)), strict=True)
        bench.line("M1", f"peak memory of P1, {name}", peaks, goal, stretch, least=False, unit=" GB")
    bench.line("P1", "checkpointed, s", laps, laps=laps)
    llama.recompute = False

    peers = as_peers(llama, batch, s)
    with torch.no_grad():
        logp, value, _ = ppo.actor_critic(llama, batch)
        for mine, other in zip((logp, value), peers(check=True), strict=True):
            error = ((mine - other).norm() / other.norm()).item()
            assert error < 0.05, f"the peers' way gives something else: {error:.1e}"
    laps = bench.race({"ours": ours, "peers": peers}, seconds=60)
    floor = update_flops(llama, prompt + new) / bench.flops
    bench.line("P1", f"PPO update {B} x {prompt + new}, s", laps["ours"], laps=laps)
    bench.line("P1", "over its floor", [t / floor for t in laps["ours"]], 1.5, 1.25, least=False, unit="x")
    ratio = [t / o for o, t in zip(laps["ours"], laps["peers"], strict=True)]
    bench.line("P2", "over the same as peers do it", ratio, 1.5, 1.8, unit="x")

    many = batch.tokens.repeat(3, 1)
    adapter = tuple((name, B) for name in ("policy", "value", "reward"))
    with torch.no_grad():
        laps = bench.race({"three": lambda: llama(many, adapter), "bare": lambda: llama(many)}, seconds=20)
    ratio = [t / b for t, b in zip(laps["three"], laps["bare"], strict=True)]
    bench.line("P3", "three adapters over the bare base", ratio, 1.08, 1.04, least=False, unit="x", laps=laps)


def peak_of(bench, run):
    """(seconds, peak GB of tensors on the GPU) of one run."""
    if bench.device == "cpu":
        return common.wall(run), 0.0
    torch.cuda.reset_peak_memory_stats()
    return common.on_device(run), torch.cuda.max_memory_allocated() / 1e9


def as_peers(llama, batch, s):
    """The PPO update as five passes with logits everywhere; a function. check: only logp and value, (B, T) each."""
    groups = [llama.adapter_parameters(name) for name in ("policy", "value")]
    update = lastmile.Optimizer(*groups, max_grad_norm=1.0)

    def logp_of(adapter):
        logits = llama.logits(llama(batch.tokens, adapter))[:, :-1]  # (B, T - 1, V)
        logp = torch.log_softmax(logits, -1).gather(-1, batch.tokens[:, 1:, None]).squeeze(-1)
        return F.pad(logp, (1, 0)) * batch.mask

    def value_of():
        return F.pad(llama.scalar(llama(batch.tokens, "value"), "value")[:, :-1], (1, 0)) * batch.mask

    def run(check=False):
        with torch.no_grad():
            reference, _, score = logp_of(None), value_of(), ppo.reward_scores(llama, batch)
        logp, value = logp_of("policy"), value_of()
        if check:
            return logp, value
        kl = 0.0 * (logp.detach() - reference)
        reward = ppo.token_rewards(batch, score, s.length_penalty, kl=kl, kl_coef=1.0)
        traj = ppo.trajectory(batch, logp, value, reward, s.gamma, s.lam, kl)
        loss = ppo.policy_loss(logp, traj, s.clip_range) + ppo.value_loss(value, traj)
        update.backward(loss)
        return update.step(s.learning_rate)

    return run
