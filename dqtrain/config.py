"""Every knob of a run: its name, type, bounds, unit and one sentence.

One complete YAML file per run, plus `a.b=c` overrides that go into the tree before it is validated. Unknown, duplicate
and ill-typed keys are errors that name the line. No torch here, and no file but the YAML itself is opened: derived
values are computed in `build.py`.
"""

import difflib
import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from dqtrain.errors import ConfigError

SPLITS = ("train", "validation", "test")


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Run(Block):
    dir: Path
    """The run directory: the identity of the run."""
    seed: int = Field(1, ge=0, lt=2**31)
    """Seed of everything random: initial weights, data order, dropout, sampled negatives."""
    watchdog_s: int = Field(1800, ge=1)
    """Seconds without a forward after which a rank leaves its stack traces in `exits/` and ends with 75, since another one hangs; longer than an update takes."""


class Teacher(Block):
    path: Path
    """A Hugging Face directory of a causal or encoder-decoder model, a hub id `hf:NAME@COMMIT`, or a finished unquantized run of dqtrain."""
    source: Literal["online", "hidden", "sampled", "top_k"] = "online"
    """Its word comes from the model beside the student, or from what `dqtrain cache-teacher` stored: last hidden states, sampled ids (unbiased) or the likeliest ids (biased)."""
    draws: int = Field(50, ge=1, le=4096)
    """Ids per token: drawn from the teacher's distribution (sampled; they repeat, about 12 differ), or the likeliest ones (top_k)."""
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """What its weights are kept and gathered in; bf16 halves both, and rounds weights that were not trained in it; int8 is bf16 with the matrices of its layers in one byte per weight, with a scale per output."""
    live_layers: int = Field(2, ge=1)
    """Layers of it that are whole at a time under `zero.teacher` 3: more are gathered ahead, for more memory."""


class Student(Block):
    architecture: dict[str, Any] | None = None
    """Keys of a Hugging Face model config, `model_type` among them: a new model with random weights (no teacher, no `init_from`)."""
    init_from: Path | None = None
    """A Hugging Face directory, a hub id `hf:NAME@COMMIT` or a finished run whose weights (and scales) start the student; null: the teacher's weights."""
    encoder_layers: int | tuple[int, ...] | None = None
    """Encoder layers that the student keeps: their number (DQ-BART's maps of 6 layers, else spaced as far as they go), or which ones, from 0; null: all."""
    decoder_layers: int | tuple[int, ...] | None = None
    """Decoder layers that the student keeps, likewise; those of a causal model too."""

    @model_validator(mode="after")
    def _check(self) -> "Student":
        for key in ("encoder_layers", "decoder_layers"):
            kept = getattr(self, key)
            if isinstance(kept, int) and kept < 1 or isinstance(kept, tuple) and (not kept or kept[0] < 0 or list(kept) != sorted(set(kept))):
                raise ValueError(f"student.{key} is {list(kept) if isinstance(kept, tuple) else kept}, but must be a number from 1, or ascending layers from 0")
        return self


class TrainTokenizer(Block):
    vocab_size: int = Field(ge=257, le=2**20)
    """Entries of the byte-level BPE tokenizer that is trained on `data.train`, the 256 bytes and the end of text included."""


class Pairs(Block):
    source: str = "source"
    """Field of a jsonl line, or column of a csv file, that a model reads."""
    target: str = "target"
    """Field or column that it writes."""
    template: str = "{source}"
    """What is made of a source before it is tokenised, such as `summarize: {source}`."""
    source_tokens: int = Field(ge=1, le=2**20)
    """Sources are cut to this many tokens."""
    target_tokens: int = Field(ge=1, le=2**20)
    """Targets are cut to this many tokens."""

    @model_validator(mode="after")
    def _check(self) -> "Pairs":
        if self.template.count("{source}") != 1:
            raise ValueError(f"template is `{self.template}`, but must hold {{source}} once")
        return self


class Source(Block):
    path: str
    """A file, a glob, an address such as `s3://bucket/*.parquet`, a folder of `datasets.save_to_disk`, `hf:NAME@REVISION`, a `builtin:` corpus, or tokens."""
    format: Literal["text", "jsonl", "csv", "parquet", "arrow", "shards"] | None = None
    """What the files are; null: what their names say (.jsonl, .csv, .parquet, .arrow, with .gz or .zst behind), text for any other name. `shards` are tokens
    already: a folder that `dqtrain prepare` made (null: one with an index.json), Megatron's PREFIX.bin or datatrove's NAME.ds."""
    text: str = "{text}"
    """What is made of the fields of a line or row, such as `{title}: {body}`; `{{` and `}}` are braces."""
    messages: str | None = None
    """Field that holds a chat, a list of `role` and `content`: the tokenizer's chat template makes the text, and only what the assistant says is predicted."""
    subset: str | None = None
    """Configuration of a Hugging Face data set, for one that has several."""
    split: str | None = None
    """Split of a data set or a built-in corpus; null: the one it is read for."""
    weight: float | None = Field(None, ge=0)
    """Share of the samples, relative to the weights of the other sources; null on all of them: each in proportion to its size."""
    max_bad_lines: int = Field(0, ge=0)
    """Lines or rows that may be left out since they cannot be read or lack the text; one more is an error."""

    @property
    def template(self) -> list[tuple[str, str | None]]:
        """`text` as literals, each with the field behind it, if there is one."""
        return [(literal, field) for literal, field, _, _ in string.Formatter().parse(self.text)]

    @model_validator(mode="after")
    def _check(self) -> "Source":
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"text is `{self.text}`, but {str(error).lower()}; write a brace that is no field twice") from None
        fields = [field for _, field, _, _ in parsed if field is not None]
        if not fields or "" in fields or any(spec or conversion for _, _, spec, conversion in parsed):
            raise ValueError(f"text is `{self.text}`, but must hold names of fields in braces, such as `{{title}}: {{body}}`, without `:` or `!`")
        if self.messages is not None and self.text != "{text}":
            raise ValueError("text and messages are both set, but a chat's text is made by the chat template; keep one of them")
        if self.subset is not None and not self.path.startswith("hf:"):
            raise ValueError(f"subset is for Hugging Face data sets, but path is {self.path}; remove it")
        return self


def _written(value: Any) -> str:
    """How a source, or a list of them, is written: which one of a union it is, so that messages are about that one alone."""
    return "(path)" if isinstance(value, str) else "(list)" if isinstance(value, list | tuple) else "(block)"


Entry = Annotated[Annotated[str, Tag("(path)")] | Annotated[Source, Tag("(block)")], Discriminator(_written)]
Sources = Annotated[Annotated[str, Tag("(path)")] | Annotated[Source, Tag("(block)")] | Annotated[tuple[Entry, ...], Tag("(list)")], Discriminator(_written)]


class Stage(Block):
    from_step: int = Field(ge=1)
    """Step from which on the weights hold: so many steps are made with those before."""
    weights: tuple[Annotated[float, Field(ge=0)], ...]
    """One for each source of `data.train`, in their order."""


class Cache(Block):
    folder: Path | None = None
    """Where copies of shards are kept that are not on this node, on a disk of the node; null: `dqtrain-shards` in the folder for temporary files."""
    gib: float = Field(200.0, gt=0)
    """Size in GiB that the copies of a node may have together; the ones that were used least recently make room."""


class Data(Block):
    train: Sources
    """What is trained on: a path, a block of how it is read, or a list of both."""
    validation: Sources | None = None
    """Corpus evaluated every `eval.every_steps`."""
    test: Sources | None = None
    """Corpus read once, at the end of the run."""
    tokenizer: Path | None = None
    """A tokenizer directory, or a hub id `hf:NAME@COMMIT`; null: the one beside the teacher or `student.init_from`."""
    train_tokenizer: TrainTokenizer | None = None
    """Train a tokenizer instead, into the run directory."""
    tokens_per_sample: int | None = Field(None, ge=2, le=2**20)
    """Tokens of one sample of text. Needed without `pairs`, and for text alone."""
    samples: Literal["packed", "documents"] = "packed"
    """Of text: documents packed one behind the other and cut every `tokens_per_sample`, or one document per sample, of which what is longer is cut off."""
    pairs: Pairs | None = None
    """Samples are pairs of a source and a target, and only target tokens are predicted; null: text."""
    shards: Path | None = None
    """Folder of the token shards; null: `shards` in the run directory. Runs may share one."""
    attention: Literal["across", "within"] = "across"
    """What a token of packed text attends to: all before it in its sample, or its own document alone, in which positions count from 0."""
    mixture: tuple[Stage, ...] = ()
    """Other weights of the sources of `train`, each from some step on. A run may go on with other stages behind the steps that it has made."""
    parts: int = Field(1, ge=1)
    """Streams that the order of `train` is made of, each over its own shards, so that a node reads some shards alone; 1: every sample may come next."""
    cache: Cache = Cache()
    quarantine: bool = False
    """Whether samples of a shard that is missing or damaged are left out, counted in the log, instead of ending the run."""

    def sources(self, split: str) -> tuple[Source, ...]:
        """The sources of `train`, `validation` or `test`; none where that is null."""
        value = getattr(self, split)
        entries = () if value is None else value if isinstance(value, tuple) else (value,)
        return tuple(Source(path=entry) if isinstance(entry, str) else entry for entry in entries)

    def longest(self, encoder_decoder: bool) -> int:
        """Most tokens that a decoder, or a causal model, reads of one sample."""
        if self.pairs is None:
            return self.tokens_per_sample or 0
        return self.pairs.target_tokens + (0 if encoder_decoder else self.pairs.source_tokens)

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if (self.pairs is None) == (self.tokens_per_sample is None):
            raise ValueError("data needs tokens_per_sample for text, or pairs for sources and targets; set one of them")
        if self.pairs is not None and self.samples == "documents":
            raise ValueError("samples is for text, but data.pairs makes a sample of each pair; remove it")
        for split in SPLITS:
            weights = [source.weight for source in self.sources(split)]
            if None in weights and any(weight is not None for weight in weights):
                raise ValueError(
                    f"of the sources of {split}, number {weights.index(None) + 1} has no weight, but another one has; give all of them one, or none"
                )
            if weights and not any(weight is None or weight > 0 for weight in weights):
                raise ValueError(f"the sources of {split} have no weight above 0; raise one")
            for source in self.sources(split):
                if self.pairs is not None and (source.messages is not None or source.text != "{text}"):
                    raise ValueError(f"{source.path} has text or messages, but data.pairs says which fields are read; keep one of them")
        if self.attention == "within" and (self.pairs is not None or self.samples == "documents"):
            raise ValueError("attention within is for packed text, where a sample holds several documents; remove it")
        sources = self.sources("train")
        if self.mixture and sources[0].weight is None:
            raise ValueError("mixture changes the weights of the sources of train, but they have none; give each a weight")
        for before, stage in zip((None, *self.mixture), self.mixture, strict=False):
            if before is not None and stage.from_step <= before.from_step:
                raise ValueError(f"mixture has a stage from step {stage.from_step} behind one from step {before.from_step}; put them in order")
            if len(stage.weights) != len(sources):
                raise ValueError(
                    f"mixture has {len(stage.weights)} weights from step {stage.from_step}, but train has {len(sources)} sources; give one for each"
                )
            if not any(stage.weights):
                raise ValueError(f"mixture has no weight above 0 from step {stage.from_step}; raise one")
        return self


class Train(Block):
    steps: int = Field(ge=1)
    """Optimizer steps."""
    global_batch: int = Field(ge=1)
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int = Field(ge=1)
    """Samples per forward and backward; must divide `global_batch`."""
    lr: float = Field(gt=0)
    """Peak learning rate of the weights."""
    scale_lr: float | None = Field(None, gt=0)
    """Peak learning rate of what quantizers learn; null: 1e-3 for gammas and zero points, `lr` for clips and steps, in the unit of what they quantize."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices; norms, biases and scales have none."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    adam_eps: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""
    precision: Literal["fp32", "bf16", "bf16_weights"] = "fp32"
    """Compute precision (bf16: autocast); weights, scales, losses, reductions and optimizer stay fp32. bf16_weights: as bf16, and every matrix is rounded to bf16
    before it is quantized or multiplied, so that stage 3 gathers 2 bytes of each element, not 4; the artifact is made of the rounded ones."""
    activation_checkpointing: bool = False
    """Keep the inputs of the student's layers alone for backward, and compute the rest again: less memory, a third more time."""
    max_skipped_steps: int = Field(0, ge=0)
    """Steps whose loss or gradient is not finite that are skipped, over the whole run; one more stops it, saved, with the batch that did it in `exits/`."""

    @property
    def computes_in(self) -> Literal["fp32", "bf16"]:
        """What products are computed in, of the teacher too."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def rounds_matrices(self) -> bool:
        """Whether every matrix is rounded to bf16 in the function that is trained."""
        return self.precision == "bf16_weights"

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}, but it must divide train.global_batch, {self.global_batch}; "
                f"set it to {max(d for d in range(1, self.micro_batch + 1) if self.global_batch % d == 0)}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(f"train.warmup_steps is {self.warmup_steps}, more than train.steps, {self.steps}; lower it")
        return self


class Zero(Block):
    student: Literal[1, 2, 3] = 3
    """ZeRO stage of the student: 1 partitions optimizer states, 2 gradients too, 3 weights too."""
    teacher: Literal[0, 3] = 3
    """ZeRO stage of the teacher: 0 keeps it whole on each rank, 3 partitions it."""
    persistence_threshold: int = Field(0, ge=0)
    """At stage 3, parameters of up to this many elements stay whole on every rank."""
    live_layers: int | None = Field(None, ge=1)
    """At stage 3, layers of the student that are whole at a time; null: up to 1e9 elements stay whole from forward to backward, which saves a second gather."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's states are: on the GPU, in host memory, where its step is computed too, or in files on a local disk, for which stage 3 brings them there piece by piece."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where partitioned weights of the student wait to be gathered: on the GPU, in host memory or in files on a local disk; stage 3 alone."""
    nvme: Path | None = None
    """A folder on a local disk (no tmpfs, which is memory) that every node has; needed with nvme. Its files have no names and are gone when the run ends, however it does."""

    @model_validator(mode="after")
    def _check(self) -> "Zero":
        needs_partitions = {
            "offload_parameters": self.offload_parameters != "none",
            "live_layers": self.live_layers is not None,
            "offload_optimizer: nvme": self.offload_optimizer == "nvme",
        }
        for key, value in needs_partitions.items():
            if value and self.student != 3:
                raise ValueError(f"zero.{key} is for partitioned weights, but zero.student is {self.student}; set it to 3, or leave out {key}")
        uses_disk = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if uses_disk and self.nvme is None:
            raise ValueError("nvme is asked for, but zero.nvme is null; set zero.nvme to a folder on a local disk that every node has")
        if self.nvme is not None and not uses_disk:
            raise ValueError("zero.nvme is set, but nothing goes there; set zero.offload_optimizer or zero.offload_parameters to nvme, or leave it out")
        return self


Bits = Literal[1, 2, 3, 4, 8, "ternary"]

BITS_OF_GRID: dict[str, tuple[Bits, ...]] = {
    "dynamic": ("ternary", 2, 3, 4, 8),
    "twn": ("ternary", 2),
    "minmax": ("ternary", 2, 3, 4, 8),
    "minmax_affine": (2, 3, 4, 8),
    "pact": ("ternary", 2, 3, 4, 8),
    "lsq": ("ternary", 2, 3, 4, 8),
    "laq": ("ternary", 2, 3, 4, 8),
    "mean43": (1, "ternary", 2),
    "absmean": ("ternary", 2),
    "seq": ("ternary", 2),
    "affine": (2, 3, 4, 8),
}
"""The bit widths that each grid exists in; the equations are in `quant/grid.py`."""


class WeightQuant(Block):
    grid: Literal["dynamic", "twn", "minmax", "minmax_affine", "pact", "lsq", "laq", "mean43", "absmean", "seq", "affine"] = "dynamic"
    """Where scales come from: `dynamic` learns gamma in clip = gamma * mean|w| (QuantGPT), `lsq`, `pact`, `seq` and `affine` learn it otherwise, the others compute it."""
    bits: Bits
    """Bits per code. 2 is ternary too, but in lsq, seq and the affine grids, where it is 4 levels; 4 has 15 or 16 levels, 8 has 255 or 256."""
    granularity: Literal["per_tensor", "per_row", "per_group"]
    """What shares one scale: a whole matrix, each row of outputs (each word, in an embedding), or each `group_size` inputs of a row."""
    group_size: int | None = Field(None, ge=1)
    """Inputs that share one scale; for per_group alone."""

    @model_validator(mode="after")
    def _check(self) -> "WeightQuant":
        if self.bits not in BITS_OF_GRID[self.grid]:
            grids = ", ".join(grid for grid, bits in BITS_OF_GRID.items() if self.bits in bits)
            raise ValueError(
                f"grid {self.grid} does not exist in {self.bits} bits, but in {', '.join(map(str, BITS_OF_GRID[self.grid]))}; grids with {self.bits} are {grids}"
            )
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                f"granularity is {self.granularity}, but group_size is {self.group_size}; per_group needs a group_size, such as 128, and the others none"
            )
        return self


class ActivationQuant(Block):
    bits: Literal[4, 8]
    """Bits per code at the input of every quantized linear layer."""
    scale: Literal["per_token", "per_tensor", "learned", "block_32", "block_256"] = "per_token"
    """One scale for each token, for the whole tensor (its real tokens), a learned one, or one for each 32 or 256 inputs by llama.cpp's own arithmetic."""
    asymmetric: Literal["one_sided", "everywhere", "nowhere"] = "one_sided"
    """Where codes have a zero point: inputs that follow an activation function and attention probabilities, all inputs of linears too, or nowhere."""
    attention: bool = False
    """Whether queries, keys, attention probabilities and values are quantized too."""

    @model_validator(mode="after")
    def _check(self) -> "ActivationQuant":
        if self.scale.startswith("block") and self.bits != 8:
            raise ValueError(f"scale {self.scale} is llama.cpp's 8-bit arithmetic, but bits is {self.bits}; set bits to 8 or scale to per_token")
        return self


class Override(Block):
    match: str
    """Glob of parameter names, such as `*.down_proj.weight`; it must match one."""
    keep_float: bool = False
    """They stay float, and so does the input of those layers."""
    weights: WeightQuant | None = None
    """How they are quantized; null: as without the override."""
    activations: ActivationQuant | None = None
    """How the input of those layers is quantized; null: as without the override."""

    @model_validator(mode="after")
    def _check(self) -> "Override":
        if self.activations is not None and self.activations.attention:
            raise ValueError("attention is a setting of quant.activations for the whole model; remove it from the override")
        if self.keep_float == (self.weights is not None or self.activations is not None):
            raise ValueError("an override has either keep_float: true, or weights or activations; set one of them")
        return self


class Quant(Block):
    linears: WeightQuant | None
    """Linear and Conv1D weights, and those of experts (each expert is a matrix of its own); null: float."""
    embeddings: WeightQuant | None
    """Word embeddings, and the head when tied to them; null: float."""
    positions: WeightQuant | None
    """Position embeddings, T5's relative bias among them; null: float."""
    float_head: bool = False
    """A quirk of DQ-BART's published code: a head that is tied to the word embeddings reads the table before rounding; the artifact then holds it beside the codes."""
    vectors: Literal["fp32", "bf16"] = "fp32"
    """Norms and biases: as they are, or rounded to bf16 in every forward (straight-through), so that the artifact holds them in 2 bytes."""
    activations: ActivationQuant | None
    """Inputs of quantized linear layers; null: float."""
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()
    """Other settings for the parameters that a glob matches; of several, the last one counts. Mixed precision, and what stays float."""
    scale_dtype: Literal["portable", "fp32"] = "portable"
    """`portable` snaps every scale to a value that fp32, fp16 and bf16 all hold exactly."""


class Logits(Block):
    weight: float = Field(1.0, ge=0)
    """Factor of the term; 0: not computed."""
    divergence: Literal["cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", "confidence_kl", "mse"] = "cross_entropy"
    """Between the teacher's distribution and the student's: cross_entropy is QuantGPT's, mse (of raw logits) DQ-BART's, confidence_kl BitDistiller's."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both; the term is multiplied with its square. Not for mse."""
    beta: float | None = Field(None, ge=0, le=1)
    """jensen_shannon: the teacher's share in the mixture (null: 0.5). confidence_kl: the share of the reverse divergence (null: the teacher's mean confidence)."""
    tokens: Literal["equal", "tsld", "entropy"] = "equal"
    """What weighs target tokens against each other: nothing, the teacher's own loss (TSLD) or its entropy; divided by their mean over the steps before."""

    @model_validator(mode="after")
    def _check(self) -> "Logits":
        if self.beta is not None and self.divergence not in ("jensen_shannon", "confidence_kl"):
            raise ValueError(f"beta is {self.beta}, but {self.divergence} has none; remove it, or set divergence to jensen_shannon or confidence_kl")
        if self.divergence == "jensen_shannon" and self.beta in (0.0, 1.0):
            raise ValueError(f"beta is {self.beta}, where jensen_shannon is 0 for any student; use forward_kl or reverse_kl, or a beta between")
        if self.divergence == "mse" and self.temperature != 1.0:
            raise ValueError(f"temperature is {self.temperature}, but mse compares raw logits; remove it")
        return self


class Hidden(Block):
    weight: float = Field(1.0, ge=0)
    """Factor of the term; 0: not computed."""
    distance: Literal["mse", "normalised_mse", "cosine"] = "mse"
    """Between hidden states of student and teacher, summed over the embeddings and every layer of the student (DQ-BART), of encoder and decoder."""
    last_encoder_state_by_sample: bool = False
    """A quirk of DQ-BART's published code: the encoder's last states count once more, their mean squared errors summed over the samples of a micro-batch."""


class Attention(Block):
    weight: float = Field(1.0, ge=0)
    """Factor of the mean squared error of attention probabilities, summed over the student's layers: encoder's, decoder's and cross (DQ-BART)."""


class Contrast(Block):
    weight: float = Field(0.1, ge=0)
    """Factor of the term; 0: not computed."""
    temperature: float = Field(0.1, gt=0)
    """Divides the cosine similarities."""
    momentum: float = Field(0.5, ge=0, lt=1)
    """Share of the bank's old value in a token's representation."""
    negatives: int = Field(32, ge=1)
    """Other tokens that each token is held against."""
    negatives_from: Literal["teacher", "student", "random"] = "teacher"
    """Whose representations they are: the teacher's or the student's of other target tokens of the sequence, or the bank's of random words."""
    bank: Literal["vocabulary", "position"] = "vocabulary"
    """What a row of the momentum bank stands for: a word, or a position in the sequence."""
    layer: int | None = Field(None, ge=0)
    """Decoder layer of the student, from 0, whose output is compared with its teacher layer's; null: the last hidden states."""

    @model_validator(mode="after")
    def _check(self) -> "Contrast":
        if self.negatives_from == "random" and self.bank == "position":
            raise ValueError("negatives_from is random, which draws words from the bank, but bank is position; set bank to vocabulary")
        return self


class Distill(Block):
    task: float = Field(0.0, ge=0)
    """Factor of the cross-entropy with the corpus."""
    logits: Logits | None = None
    """Distance from the teacher's distribution over the vocabulary; null: not computed."""
    hidden: Hidden | None = None
    """Distance of hidden states, through the layer map; null: not computed."""
    attention: Attention | None = None
    """Distance of attention probabilities, through the layer map; null: not computed."""
    contrast: Contrast | None = None
    """Token-level contrast with the teacher's hidden states (QuantGPT); null: not computed."""
    padding_counts: bool = False
    """A quirk of DQ-BART's published code: padded positions count in the logits, hidden and attention terms."""

    @property
    def teacher_terms(self) -> tuple[str, ...]:
        """Names of the live terms that need the teacher."""
        return tuple(name for name in ("logits", "hidden", "attention", "contrast") if (term := getattr(self, name)) is not None and term.weight > 0)

    @model_validator(mode="after")
    def _check(self) -> "Distill":
        if not (self.task or self.teacher_terms):
            raise ValueError("distill has no term with a weight above 0; set distill.task or distill.logits")
        if self.padding_counts and self.logits is not None and self.logits.tokens != "equal":
            raise ValueError("distill.padding_counts counts what has no label, which no distill.logits.tokens but equal can weigh; set one of them back")
        return self


class Generation(Block):
    max_new_tokens: int = Field(ge=1)
    """Longest text that is generated."""
    min_new_tokens: int = Field(0, ge=0)
    """Before this many tokens the end of text is not allowed."""
    num_beams: int = Field(1, ge=1)
    """Width of the beam search; 1: greedy."""
    length_penalty: float = 1.0
    """Exponent of the length that divides a beam's score."""
    early_stopping: bool = False
    """Whether the search ends as soon as `num_beams` texts are finished."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No n-gram of this size is generated twice; 0: allowed."""
    validation_samples: int = Field(0, ge=0)
    """Sources of the validation split that are generated from at each evaluation; the test split is always generated whole."""
    dropout: bool = False
    """A quirk of DQ-BART's published code: validation text is generated with dropout on."""

    @model_validator(mode="after")
    def _check(self) -> "Generation":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens, {self.max_new_tokens}; lower it")
        return self


class Evaluation(Block):
    every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations on `data.validation`; null: one, at the last step."""
    max_samples: int | None = Field(None, ge=1)
    """At most this many validation samples (the first ones); null: all. The test split is always read whole."""
    generation: Generation | None = None
    """Text is generated from the sources of pairs and scored against all references of a source (ROUGE, BLEU); null: not."""


class Checkpoint(Block):
    every_steps: int = Field(ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(2, ge=1)
    """Newest complete checkpoints that are kept, besides the best one."""
    keep_every: int | None = Field(None, ge=1)
    """Those of steps that this divides are kept as well; null: none."""


Target = Literal["packed", "gguf", "onnx", "openvino", "compressed-tensors", "hf"]


class Export(Block):
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint is tested and exported: the last, or the one with the lowest validation loss."""
    targets: tuple[Target, ...] | None = None
    """What is made of it: packed codes, a GGUF file for llama.cpp, graphs for ONNX Runtime or OpenVINO, a directory of compressed-tensors for transformers or vLLM, a Hugging Face directory of floats;
    null: packed, or hf for a student that is not quantized."""
    gguf: Literal["smallest", "fastest"] = "smallest"
    """Blocks of ternary weights in a GGUF file: TQ1_0, 1.7 bits each, or TQ2_0, 2.1 bits, which llama.cpp runs faster."""
    compressed_tensors: Literal["transformers", "vllm"] = "transformers"
    """Which program a directory of compressed-tensors is laid out for; each reads some of what the other does not."""
    hf: Literal["fp32", "bf16"] = "fp32"
    """Floats of a Hugging Face directory; bf16 takes half the bytes and holds 1-bit and ternary matrices, 2-bit `lsq` and `vectors: bf16` exactly."""
    allow_inexact: bool = False
    """Whether a target may hold a student otherwise than it was trained (GGUF: fp32 scales rounded to fp16; hf: values rounded to bf16; compressed-tensors: activations that its program does not run as floats;
    all: weights that they have no codes for as floats), or be noisier."""


class Log(Block):
    every_steps: int = Field(10, ge=1)
    """Steps between log lines."""
    weights_every_steps: int | None = Field(None, ge=1)
    """Steps between looks at every quantized weight (TensorBoard: scales, codes, clipping, error, codes that changed since the last look); null: at each checkpoint."""


class RunConfig(Block):
    run: Run
    teacher: Teacher | None
    """The model to imitate; null: ordinary training."""
    student: Student = Student()
    data: Data
    train: Train
    zero: Zero = Zero()
    quant: Quant | None
    """How the student is quantized; null: not at all."""
    distill: Distill
    eval: Evaluation = Evaluation()
    checkpoint: Checkpoint
    export: Export = Export()
    log: Log = Log()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        count = self.train.global_batch // self.train.micro_batch
        if count % self.data.parts:
            raise ValueError(
                f"data.parts is {self.data.parts}, but must divide the {count} micro-batches of a step, so that each part gives as many; "
                f"set it to {max(d for d in range(1, self.data.parts + 1) if count % d == 0)}"
            )
        if self.distill.teacher_terms and self.teacher is None:
            raise ValueError(f"distill.{self.distill.teacher_terms[0]} needs a teacher, but teacher is null; set teacher.path, or use distill.task alone")
        if self.teacher is not None and self.teacher.source != "online":
            known = {"hidden": {"logits", "contrast"}, "sampled": {"logits"}, "top_k": {"logits"}}[self.teacher.source]
            missing = [name for name in self.distill.teacher_terms if name not in known]
            missing += ["contrast.layer"] * (self.distill.contrast is not None and self.distill.contrast.layer is not None)
            missing += ["padding_counts"] * self.distill.padding_counts
            if missing:
                raise ValueError(f"distill.{missing[0]} needs more than teacher.source {self.teacher.source} stores; set it to online")
            logits = self.distill.logits
            if self.teacher.source != "hidden" and logits and (logits.divergence, logits.temperature, logits.tokens) != ("cross_entropy", 1.0, "equal"):
                raise ValueError(
                    f"teacher.source {self.teacher.source} knows some ids alone, enough for a distill.logits of divergence cross_entropy, temperature 1 and tokens equal; "
                    "set source to hidden"
                )
        if self.eval.generation is not None and self.data.pairs is None:
            raise ValueError("eval.generation writes targets of sources, but data.pairs is null; set data.pairs, or eval.generation to null")
        if self.eval.generation is not None and self.eval.generation.validation_samples and self.data.validation is None:
            raise ValueError("eval.generation.validation_samples is set, but data.validation is null; name a validation corpus, or set it to 0")
        if self.eval.generation is not None and self.data.test is None and not self.eval.generation.validation_samples:
            raise ValueError("eval.generation has nothing to write for: data.test is null and eval.generation.validation_samples is 0; set one of them")
        if self.student.architecture is not None and (self.student.encoder_layers is not None or self.student.decoder_layers is not None):
            raise ValueError("student.encoder_layers and decoder_layers cut a model, but student.architecture makes a new one; give it its number of layers")
        if self.student.architecture is not None and (self.student.init_from or self.teacher):
            raise ValueError("student.architecture makes a new model, but teacher.path or student.init_from gives one; keep one of them")
        if self.student.architecture is None and self.student.init_from is None and self.teacher is None:
            raise ValueError("nothing says what the student is; set teacher.path, student.init_from or student.architecture")
        if self.student.architecture is not None and "model_type" not in self.student.architecture:
            raise ValueError("student.architecture has no model_type; add one, such as `model_type: gpt2`")
        if self.data.tokenizer and self.data.train_tokenizer:
            raise ValueError("data.tokenizer and data.train_tokenizer are both set; keep one")
        if self.student.architecture is not None and not (self.data.tokenizer or self.data.train_tokenizer):
            raise ValueError("a new model has no tokenizer; set data.tokenizer or data.train_tokenizer")
        if self.eval.every_steps and self.data.validation is None:
            raise ValueError("eval.every_steps is set, but data.validation is null; name a validation corpus or set eval.every_steps to null")
        if self.export.checkpoint == "best" and self.data.validation is None:
            raise ValueError("export.checkpoint is best, but data.validation is null; name a validation corpus, or use export.checkpoint: last")
        if self.data.train_tokenizer and (self.teacher or self.student.init_from):
            raise ValueError("data.train_tokenizer makes new token ids, which mean nothing to a trained model; remove it, or teacher and student.init_from")
        return self


def check_ranks(train: Train, world_size: int) -> None:
    """Raise ConfigError when a step has fewer micro-batches than there are ranks: some would never have work."""
    count = train.global_batch // train.micro_batch
    if count < world_size:
        if train.global_batch < world_size:
            advice = f"set train.global_batch to {world_size} or more"
        else:
            advice = f"set train.micro_batch to {max(d for d in range(1, train.global_batch // world_size + 1) if train.global_batch % d == 0)}"
        raise ConfigError(
            f"a step has {count} micro-batches (train.global_batch {train.global_batch} / train.micro_batch {train.micro_batch}), which {world_size} ranks "
            f"cannot share; {advice}, or start at most {count} ranks."
        )


PASSIVE = frozenset(
    "run.dir run.watchdog_s data.shards data.mixture data.cache.folder data.cache.gib data.quarantine log.every_steps log.weights_every_steps checkpoint.every_steps checkpoint.keep_last checkpoint.keep_every "
    "eval.every_steps eval.max_samples eval.generation zero.student zero.teacher zero.persistence_threshold zero.live_layers zero.offload_optimizer "
    "zero.offload_parameters zero.nvme teacher.live_layers train.activation_checkpointing train.max_skipped_steps".split()
) | {f"{block}.{name}" for block, kind in (("eval.generation", Generation), ("export", Export)) for name in kind.model_fields}
"""Fields that may change when a run continues: the training goes on with the same samples and, up to the order of sums, the same numbers. Of `data.mixture`, only what
is ahead may (`checkpoint.require_same_config`)."""


class _Loader(yaml.SafeLoader):
    """YAML with duplicate keys refused, and `3e-5` read as a float as YAML 1.2 does."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.lines: dict[tuple[str, ...], int] = {}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))$"),
    list("-+0123456789."),
)
# YAML 1.1 reads `1_000`, `010`, `0x10` and `1:30` as integers and `2026-10-01` as a date; only plain decimal integers are taken here.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}
for _first in "-+0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$")))


def _construct(loader: _Loader, node: yaml.Node, path: tuple[str, ...], name: str) -> Any:
    loader.lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            if key in tree:
                raise ConfigError(f"{name}:{key_node.start_mark.line + 1}: {'.'.join((*path, key))}: given twice. Keep one of the two lines.")
            tree[key] = _construct(loader, value_node, (*path, key), name)
            loader.lines[(*path, key)] = key_node.start_mark.line + 1
        return tree
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, str(i)), name) for i, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _read_yaml(text: str, name: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        tree = {} if node is None else _construct(loader, node, (), name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {getattr(error, 'problem', error)}. Mend the line.") from None
    finally:
        loader.dispose()
    return tree, loader.lines


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> set[tuple[str, ...]]:
    """Put `a.b=c` pairs into the tree; the values are YAML. Returns the paths that were set."""
    paths = set()
    for pair in overrides:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"override `{pair}` is not of the form a.b=value, such as train.steps=100.")
        path = tuple(key.split("."))
        node = tree
        for part in path[:-1]:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[path[-1]] = _read_yaml(text, f"override {key}")[0] if text else ""
        paths.add(path)
    return paths


def _parts_of(annotation: Any) -> list[Any]:
    return [annotation, *(part for inner in getattr(annotation, "__args__", ()) for part in _parts_of(inner))]


def _fields_at(path: tuple[str, ...], model: Any) -> list[str]:
    """Names of the fields of the block at a path below a model, for hints."""
    for part in path:
        if part.isdigit():  # an entry of a list
            continue
        field = model.model_fields.get(part)
        if field is None:
            return []
        model = next((a for a in _parts_of(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _explain(error: ValidationError, kind: type[Block], name: str, lines: dict[tuple[str, ...], int], overridden: set[tuple[str, ...]]) -> str:
    messages = []
    for problem in error.errors(include_url=False):
        where_in = tuple(str(part) for part in problem["loc"] if part not in ("(path)", "(block)", "(list)"))
        path = where_in
        while path and path not in lines and not any(o[: len(path)] == path for o in overridden) and problem["type"] != "missing":
            path = path[:-1]  # a union adds the name of its branch to the path
        dotted = ".".join(path)
        line = lines.get(path) or next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 1)
        where = "command line" if any(path[: len(o)] == o for o in overridden) else f"{name}:{line}"
        if problem["type"] == "extra_forbidden":
            *parents, key = where_in
            known = _fields_at(tuple(parents), kind)
            nearest = difflib.get_close_matches(key, known, 1, 0.5)
            text = (
                (f"{key}: " * (path[-1] != key)) + "unknown key. " + (f"Did you mean `{nearest[0]}`?" if nearest else f"Known keys here: {', '.join(known)}.")
            )
        elif problem["type"] == "missing":
            text = "missing. Add it."
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"]) + "."
        else:
            text = f"is {json.dumps(problem['input'], default=str)}, but {problem['msg'][0].lower() + problem['msg'][1:]}."
        message = f"{where}: {dotted}: {text}" if dotted else f"{where}: {text}"
        if message not in messages:
            messages.append(message)
    return "\n".join(messages)


AnyBlock = TypeVar("AnyBlock", bound=Block)


def load_block(kind: type[AnyBlock], what: str, path: Path, overrides: Sequence[str] = ()) -> AnyBlock:
    """Read one YAML file and `a.b=c` overrides into a block; `what` says what the file should have been. Raises ConfigError that names file, line and key."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give the path of {what}.") from None
    tree, lines = _read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: holds {type(tree).__name__}, but must be a mapping with keys such as `{next(iter(kind.model_fields))}:`. Give {what}.")
    overridden = _apply_overrides(tree, overrides)
    return _validate(kind, tree, str(path), lines, overridden)


def _validate(kind: type[AnyBlock], tree: dict[str, Any], name: str, lines: dict[tuple[str, ...], int], overridden: set[tuple[str, ...]]) -> AnyBlock:
    try:
        # Strict JSON mode takes str for Path and list for tuple, and refuses "3e-5", true and 1.0 for numbers and ints.
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, name, lines, overridden)) from None


def validate(tree: dict[str, Any], name: str) -> RunConfig:
    """Tree of plain values -> RunConfig. Raises ConfigError that names the file or whatever `name` is, and the key."""
    return _validate(RunConfig, tree, name, {}, set())


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one YAML file and `a.b=c` overrides. Raises ConfigError that names file, line and key."""
    return load_block(RunConfig, "a YAML config, such as configs/causal.yaml", path, overrides)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ, dotted name -> (old, new)."""

    def leaves(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {path: value}
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}.{key}" if path else key).items()}

    a, b = (leaves(json.loads(c.model_dump_json()), "") for c in (old, new))
    return {key: (a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)] if a.get(key) != b.get(key)}


def schema() -> str:
    """JSON schema of a config file, for editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=1) + "\n"
