"""The configuration as frozen dataclasses: one class for each group in `conf/`.

These classes are what the program reads, with the defaults; `conf/*.yaml` is what the user edits; `loader.py` checks
the second against the first. Choices are `Literal`s; a test holds them equal to the tables of the `build_*` functions.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from megalite.config.schema_launch import LaunchConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Recompute = Literal["none", "selective", "full"]
ContextMethod = Literal["auto", "ulysses", "ring"]
Offload = Literal["none", "optimizer", "parameters"]
Positions = Literal["learned", "none", "rotary", "sinusoidal"]
RotaryScaling = Literal["linear", "llama3", "ntk", "yarn"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu_squared", "swiglu"]
OnSaveError = Literal["continue", "retry", "stop"]
Packing = Literal["best_fit", "documents", "stream"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. Sizes are counts of elements; `None` is filled in as the comment says."""

    architecture: Literal["decoder"] = "decoder"
    vocab_size: int | None = None  # None: the vocabulary of the first training store
    max_sequence_length: int = 1024  # tokens; the length of the position table, and the longest sequence accepted
    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: num_attention_heads; fewer: grouped-query attention
    head_size: int | None = None  # None: hidden_size / num_attention_heads
    ffn_hidden_size: int | None = None  # None: 4 * hidden_size
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    activation: Activation = "gelu"
    positions: Positions = "learned"
    rotary_base: float = 10000.0
    rotary_scaling: "RotaryScalingConfig | None" = None
    bias: bool = True  # biases in linear layers
    qkv_bias: bool | None = None  # of the query, key and value projection alone; None: as bias
    qk_norm: bool = False  # RMS norm of each head's queries and keys
    parallel_residual: bool = False  # attention and MLP side by side, both from the block's input
    sliding_window: int | None = None  # tokens that a token sees, itself included; None: all before it
    attention_soft_cap: float | None = None  # attention scores are squashed into +- this
    logit_soft_cap: float | None = None  # the head's logits are squashed into +- this
    tied_embeddings: bool = True  # the output head shares the token embedding
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    init_std: float = 0.02

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, with the default applied."""
        return self.num_key_value_heads if self.num_key_value_heads is not None else self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head, with the default applied."""
        return self.head_size if self.head_size is not None else self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the MLP's hidden layer, with the default applied."""
        return self.ffn_hidden_size if self.ffn_hidden_size is not None else 4 * self.hidden_size

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases, with the default applied."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def known_vocab_size(self) -> int:
        """`vocab_size` once preflight has filled it in."""
        assert self.vocab_size is not None, "preflight fills model.vocab_size before anything is built"
        return self.vocab_size


@dataclass(frozen=True, kw_only=True)
class RotaryScalingConfig:
    """How rotary positions reach beyond the length that a model was first trained on; see `layers.positions`."""

    method: RotaryScaling = "llama3"
    factor: float = 8.0  # how many times longer
    original_max_sequence_length: int = 8192  # llama3, yarn
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_slow: float = 1.0  # yarn
    beta_fast: float = 32.0  # yarn


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, how much at once, how often."""

    steps: int = 100
    stop_after: int | None = None  # stop and save at this step while the schedule still spans `steps`
    global_batch_size: int = 32  # sequences a step, over all replicas
    micro_batch_size: int = 0  # sequences a data-parallel replica takes at once; 0: what divides its share, 32 at most
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: only at the end
    max_skipped_steps: int = 5  # stop after so many in a row with inf or nan; fp16 first lowers its loss scale


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes; the data axis is what remains of the world size."""

    tensor: int = 1
    sequence: bool = True  # split the sequence over the tensor axis between its layers; no effect at tensor 1
    context: int = 1  # ranks that share each sequence, for sequences too long for one
    context_method: ContextMethod = "auto"  # auto: ulysses while there are heads for it, then ring


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What DeepSpeed is asked to do."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Precision = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    grad_clip: float = 1.0  # largest global gradient norm; 0 turns clipping off
    recompute: Recompute = "none"
    compile: bool = False  # torch.compile of each block
    offload: Offload = "none"
    ds_overrides: dict[str, Any] = field(default_factory=dict)  # merged into ds_config.json last


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model is trained to predict."""

    name: Literal["causal_lm"] = "causal_lm"
    label_smoothing: float = 0.0  # share of the probability that is spread over the whole vocabulary
    z_loss: float = 0.0  # weight of the squared logarithm of the softmax's sum; PaLM took 1e-4


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer; weight decay acts on matrices only."""

    name: Literal["adam", "adamw"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps, as a fraction of `optimizer.lr`."""

    name: Literal["constant", "cosine", "inverse_sqrt", "linear"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1  # where cosine and linear end, relative to optimizer.lr


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """One token store in a blend."""

    path: str
    weight: float = 1.0
    name: str | None = None  # None: the folder's name; names a source in eval/<name>/loss

    @property
    def source(self) -> str:
        """The name under which this store's figures are reported."""
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Other weights for the stores of data.train from a step on; their draws go on where they stand."""

    step: int  # it begins with the sample step * trainer.global_batch_size
    weights: tuple[float, ...]  # one for each store, in their order; 0 leaves it out, give or take the sample at `step`


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from. A plain path stands for a list of one store."""

    train: tuple[StoreConfig, ...]
    validation: tuple[StoreConfig, ...] = ()
    schedule: tuple[WeightsConfig, ...] = ()  # later weights, instead of those in `train`, by rising steps
    sequence_length: int = 1024  # tokens; conf/train.yaml refers to the model's longest
    packing: Packing = "stream"  # what a sequence is cut from; best_fit and documents after `megalite data pack`
    document_attention: bool = False  # attention stays within a document
    document_positions: bool = False  # positions restart with each document
    skip_steps: tuple[tuple[int, int], ...] = ()  # pairs of the first and last of steps whose batches are left out
    # SOURCE:INDEX, as `megalite data trace` names them: none of their tokens is predicted. Others that share a sequence
    # still see them, unless document_attention=true.
    skip_documents: tuple[str, ...] = ()
    prefetch: int = 2  # steps whose batches are read ahead, in a thread; 0: none

    @property
    def needs_documents(self) -> bool:
        """Whether the model must be told which document a token belongs to."""
        return self.document_attention or self.document_positions


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, how many to keep, where to continue from."""

    save_every: int = 0  # steps; 0: only at the end
    ephemeral_every: int = 0  # steps; saved only to continue from: removed when a newer one is there; 0: none
    keep: int = 2  # the last so many
    keep_every: int = 0  # steps; of those saved, multiples of it are kept for ever; 0: none
    keep_best: bool = False  # keep the one with the lowest mean validation loss too
    asynchronous: bool = False  # training goes on while a copy in host memory is written
    on_save_error: OnSaveError = (
        "continue"  # to the next save, unless it is the last; stop; retry a few times, then stop
    )
    # auto: the newest checkpoint of run_dir; never; or a checkpoint's path. The same command given again goes on from
    # what it has saved until the run is at its end.
    resume: str = "auto"
    allow_changes: tuple[str, ...] = ()  # keys that may differ from the checkpoint's configuration


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The watchdog: it names the rank that holds all others up, and ends the job."""

    watchdog: bool = True
    timeout: float | None = None  # seconds in which no rank moves; null: learned, 60 or 10 times what is usual
    start_timeout: float = 1800.0  # seconds, for the start and the first step, which compiles


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. The API key is read by wandb itself from its environment, never from here."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "megalite"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go besides metrics.jsonl and the terminal."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything one training run is made of; frozen into run_dir/config.yaml."""

    run_name: str
    run_dir: str
    seed: int = 1234
    model: ModelConfig
    trainer: TrainerConfig
    parallel: ParallelConfig
    engine: EngineConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    guard: GuardConfig = field(default_factory=GuardConfig)
    launch: LaunchConfig
    logging: LoggingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`megalite eval`."""

    run_dir: str
    checkpoint: str | None = None  # None: the newest of run_dir
    data: tuple[StoreConfig, ...] = ()  # none: the run's own data.validation
    micro_batch_size: int = 32  # sequences at once


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """`megalite generate`."""

    run_dir: str
    checkpoint: str | None = None  # None: the newest of run_dir
    prompt: str = ""  # empty: the model begins a document
    max_new_tokens: int = 200
    num_samples: int = 1
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # sample from the k likeliest tokens only
    top_p: float | None = None  # sample from the likeliest tokens that hold this share of the probability
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """`megalite report`."""

    run_dir: str  # of a training run


@dataclass(frozen=True, kw_only=True)
class ResumeCheckConfig:
    """What `megalite resume-check` takes beside the keys of the training that it checks."""

    steps: int = 2  # before the interruption, and as many again after it
    kill: bool = True  # besides stopping: kill -9 all ranks in the middle of a step and run the same command again
    directory: str | None = None  # where the temporary run directories are made; null: where TMPDIR says
    compare: tuple[str, ...] = ()  # two run directories that you trained elsewhere: compare them and train nothing


@dataclass(frozen=True, kw_only=True)
class ResumeCheckKeys:
    """The keys of `megalite resume-check` as they stand on its command line."""

    resume_check: ResumeCheckConfig = field(default_factory=ResumeCheckConfig)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """`megalite doctor`."""

    run_dir: str = "."  # the disk that holds it is looked at; it need not exist
    port: int = 29500  # the port that torchrun and deepspeed meet on
    min_free_gib: float = 10.0  # less free disk space than this is a warning
    nproc_per_node: int | None = None  # so many ranks measure how fast they can add up a tensor; null: not measured
    size_mib: int = 64  # of that tensor


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """`megalite import`."""

    hf: str  # a folder of Hugging Face: config.json, safetensors, tokenizer
    output: str  # the run directory to make, at step 0


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`megalite export`."""

    output: str  # the folder to make
    run_dir: str | None = None  # a run, whose newest checkpoint is taken
    checkpoint: str | None = None  # or this one
    format: Literal["hf"] = "hf"
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # null: that of the training
