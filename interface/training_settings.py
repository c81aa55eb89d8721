"""Settings of what makes a model or changes a weight: pretrain, quantize, reward, mle, ppo."""

from dataclasses import dataclass

from interface.settings import Common, free, opt

SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class Schedule(Common):
    """What every training needs."""

    batch_size: int = opt(7, "rows a step (P 3.1)", least=1)
    learning_rate: float = opt(1e-5, "peak, cosine to 0 (P 3.1)", toy=3e-3, above=0)
    epochs: int = opt(1, "passes over the data (P 3.1)", least=1)
    max_steps: int = opt(0, "stop after this many steps instead of after --epochs; 0: no limit", least=0)
    train_examples: int = opt(0, "random subset of the training examples; 0: all, of xsum 15,000 (P 4.2)", least=0)
    max_grad_norm: float = opt(1.0, "clip each adapter's gradient norm (choice: Hugging Face's default)", above=0)
    log_every: int = free(10, "steps between updates of the progress bar, in ppo also of the KL to the base", least=1)
    grad_checkpoint: bool = free(False, "recompute activations in backward: the same gradients, less memory")
    micro_batch_size: int = free(0, "rows in one forward pass, to save memory; the same update; 0: all", least=0)
    resume: str = free("", "continue from the latest valid checkpoint (auto, or no value), or from the folder of one")
    save_every: int = free(100, "steps between checkpoints", least=1)
    keep_checkpoints: int = free(2, "recent checkpoints to keep", least=2)
    max_time: float = free(0.0, "save and stop after this many minutes, as on SIGTERM; 0: never", least=0)
    report_to: str = free("", "log to tensorboard, wandb, or both (tensorboard,wandb) [neither]")
    deterministic: bool = opt(False, "the same bits in every run on a GPU, slower; a CPU needs no flag")


@dataclass(frozen=True)
class Pretrain(Schedule):
    """a tiny Llama from scratch on --data, tokenizer included"""

    vocab_size: int = opt(1024, "pieces of the tokenizer, 256 of them bytes", least=300)
    hidden_size: int = opt(128, "width C", least=8)
    intermediate_size: int = opt(352, "width of the MLP, 8/3 C rounded to 32", least=8)
    num_hidden_layers: int = opt(4, "blocks", least=1)
    num_attention_heads: int = opt(4, "query heads", least=1)
    num_key_value_heads: int = opt(4, "key and value heads", least=1)
    batch_size: int = opt(16, "rows a step (choice: of 8, a step would cost two thirds as much)", least=1)
    learning_rate: float = opt(4e-3, "peak, cosine to 0 (choice)", above=0)
    warmup_steps: int = opt(20, "linear rise to the peak: fresh weights need it, adapters (B = 0) do not", least=0)
    chatter: bool = opt(True, "on data other than the toy learn a chat model's opening and the input's first words, "
                              "not the outputs, which the base must not have seen")  # fmt: skip


@dataclass(frozen=True)
class Quantize(Common):
    """any fp16 or fp32 Llama folder to 4 bits by GPTQ"""

    group_size: int = opt(128, "weights that share a scale; -1: a whole column", toy=32, least=-1)
    act_order: bool = opt(False, "quantize columns of large activation first: more exact, slower to unpack")
    scale_search: bool = opt(False, "choose each scale for the least rounding error, not to span the largest weight")
    true_sequential: bool = opt(False, "calibrate o_proj on the quantized q, k, v, and so on: more exact, slower")
    damp: float = opt(0.01, "add this share of the mean of the Hessian's diagonal to it", above=0)
    calibration_examples: int = opt(128, "training examples that calibrate", least=1)


@dataclass(frozen=True)
class Training(Schedule):
    """What every adapter needs."""

    eval_every: int = free(0, "steps between validations; 0: never (P)", least=0)
    eval_examples: int = free(200, "validation examples, a random subset", least=2)
    push: str = free("", "OWNER/NAME: upload the result to the Hugging Face Hub, as a private model; of ppo the policy")
    keep: str = free(
        "last", "save the adapter of the last step (P) or of the best validation", choices=("last", "best")
    )
    tune: str = opt("lora", "train an adapter (P 3.1) or all weights of an unquantized base", choices=("lora", "full"))
    lora_r: int = opt(32, "rank (P 3.1)", least=1)
    lora_alpha: float = opt(16.0, "the low-rank term is scaled by alpha / r (P 3.1)", above=0)
    lora_targets: str = opt(SEVEN, "projections that carry adapters (choice: all seven)")
    init: str = free("base", "where the adapter (ppo: the policy) starts: base (P 3.1), mle, or an adapter folder")


@dataclass(frozen=True)
class Reward(Training):
    """the token-level reward model (paper, 3.2)"""

    batch_size: int = opt(14, "rows a step, positives and negatives mixed (P 3.1)", least=1)
    learning_rate: float = opt(1e-5, "peak, cosine to 0 (P 3.1)", toy=2e-3, above=0)
    lora_r: int = opt(16, "rank (P 3.1)", least=1)
    eval_examples: int = free(200, "validation examples in the held-out report", least=2)
    share_prompts: bool = opt(True, "batch rows that share a prompt and run it once; off: shuffle rows individually")
    rows_per_prompt: int = opt(0, "rows of one prompt in a batch, at most; 0: up to half a batch (choice)", least=0)
    level: str = opt("token", "score tokens (P 3.2), or sequences by the last one", choices=("token", "sequence"))
    head: str = opt(
        "scalar", "what scores a token: a scalar head (P 3.2), or its likelihood under the adapter (beyond P)",
        choices=("scalar", "likelihood"),
    )  # fmt: skip
    hallucinations: str = opt(
        "off", "more negatives: the truth with one edit; judge its span, or the whole sequence (beyond P)",
        choices=("off", "span", "sequence"),
    )  # fmt: skip
    best_of: int = free(0, "compare the best of so many outputs with greedy ones after training: judge", least=0)
    samples: str = opt("", "more negatives: answers of these to the same inputs: base, mle, policy (beyond P)")
    rounds: int = opt(1, "rounds of freshly drawn negatives, each used once (beyond P)", least=1)


@dataclass(frozen=True)
class Mle(Training):
    """the maximum-likelihood control (paper, 3.4)"""

    best_of: int = opt(
        0, "also learn the best of so many samples of --init's model, as --reward picks it (RAFT, beyond P)", least=0
    )
    reward: str = free("", "who picks, as of ppo [<output-dir>/reward]")
    eos_in_labels: bool = opt(True, "learn to stop; off reproduces an MLE control that never does (choice: on)")


@dataclass(frozen=True)
class Ppo(Training):
    """policy and value by PPO (paper, 3.3)"""

    eval_examples: int = free(50, "validation examples, a random subset, answered greedily", least=2)
    gamma: float = opt(0.99999, "discount (P 3.3)", above=0, most=1)
    lam: float = opt(0.95, "GAE's lambda (P 3.3)", least=0, most=1)
    clip_range: float = opt(0.2, "epsilon of eq. 3; inert at one update a batch (choice: Schulman's)", above=0)
    ppo_epochs: int = opt(1, "updates a batch (P 3.3)", least=1)
    length_penalty: float = opt(2.5, "for each token beyond the reference length (P 3.2)", least=0)
    ground_truth_fraction: float = opt(0.5, "share of batches that show the ground truth (P 3.3)", least=0, most=1)
    reward: str = free("", "reward adapter folder; or rouge, or module:function, a function of (source, reference, "
                           "prediction) (beyond P) [<output-dir>/reward]")  # fmt: skip
    kl_coef: float = opt(0.0, "cost of each nat from the base policy (P 3.3: none)", least=0)
    entropy_coef: float = opt(0.0, "bonus for entropy (P 3.3: none)", least=0)
    whiten: bool = opt(False, "advantages to mean 0, variance 1 a batch (choice: off, the paper names none)")
    value_warmup_steps: int = opt(0, "first steps in which the value alone learns (choice: none)", least=0)
    value_clip: float = opt(0.0, "clip the value's change to this; 0: do not (choice: off)", least=0)
    reward_clamp: float = opt(0.0, "clamp the reward model's score to +- this; 0: do not (choice: off)", least=0)
