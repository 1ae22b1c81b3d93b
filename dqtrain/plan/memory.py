"""Bytes of a rank: what lies between two steps, and what a step puts on top (the sums that `dqtrain.plan` describes)."""

from collections.abc import Mapping
from dataclasses import dataclass

from dqtrain.config import RunConfig
from dqtrain.plan.model import Kept, Model, Models, Stack, read_models

CONTEXT_BYTES = 1.2e9
"""CUDA's context, kernels of the libraries and NCCL's buffers."""

CHUNK_BYTES = 128 * 2**20
"""distill/chunked.py's."""

LIVE_ELEMENTS, PIECE_ELEMENTS = 10**9, 5 * 10**7
"""engine.py's: what the student keeps gathered, and what is prefetched, reduced (a buffer of so many fp32 elements on a GPU, whatever the model) or, at stage 3, updated at a time."""

DISK_PIECE_ELEMENTS = 10**7
"""engine.py's: what is updated at a time from a local disk."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by moment and part, and what it takes of its node's host memory and local disk."""

    moments: dict[str, dict[str, float]]  # "start", "rest" (between two steps), "forward", "backward", "update"
    host_per_rank: dict[str, float]
    disk_per_rank: float

    @property
    def peak(self) -> dict[str, float]:
        """The parts of the moment that takes most."""
        return max(self.moments.values(), key=total_of)

    @property
    def bytes(self) -> float:
        """Of that moment."""
        return total_of(self.peak)


def kept_by_layer(stack: Stack, config: RunConfig, tokens: int, sources: int, mask_bytes: int = 1) -> float:
    """Bytes that one layer keeps for backward of one sample of `tokens`, whose encoder reads `sources`.

    Norms read and keep fp32; products keep what they multiply in the compute dtype, and where autocast makes that, a copy for each product. Fused
    attention keeps its operands and its output. What a quantizer gives takes the place of what it read, so that quantizing keeps no more.
    """
    number = 2 if config.train.computes_in == "bf16" else 4
    width, query, key = stack.width, stack.heads * stack.head_dim, stack.key_heads * stack.head_dim
    fused = stack.fused and not is_eager(config)
    norm = (8 if stack.rms else 4) * width
    mask = mask_bytes * width if stack.dropout else 0  # of dropout

    def attention(keys: int) -> float:
        kept: float = norm + number * width * (3 if number == 2 and not stack.joint else 1) + mask
        kept += 2 * number * query + 2 * number * (key if fused else query) * keys / tokens  # queries and output, keys and values
        kept += (number + 4) * (query + key) if stack.normed_heads else 0
        if fused:
            return kept + 4 * stack.heads
        dropped = number + mask_bytes if stack.dropout else number % 4  # the probabilities that are multiplied, where they are others
        return kept + stack.heads * keys * (4 + dropped)

    # Bytes per element that the activation function keeps, beside the input of the product behind it.
    function = {"gelu_new": 16 if number == 4 else 14, "relu": 0}.get(stack.activation, number)
    if stack.gated:
        function += 2 * number  # both factors of the product
    feed_forward = norm + number * width * (2 if stack.gated and number == 2 else 1) + (function + number) * stack.inner
    behind = 2 * (number + 4) * width if stack.norms_behind else 0
    return tokens * (attention(tokens) + (attention(sources) if stack.cross else 0) + feed_forward + mask + behind)


def is_eager(config: RunConfig) -> bool:
    """Whether attention probabilities are kept: those that are compared or quantized."""
    compared = config.distill.attention is not None and config.distill.attention.weight > 0
    return compared or (config.quant is not None and config.quant.activations is not None and config.quant.activations.attention)


def lengths(config: RunConfig, model: Model) -> tuple[int, int]:
    """Tokens of a sample that the decoder and the encoder read, at most."""
    sources = config.data.pairs.source_tokens if config.data.pairs is not None and model.is_encoder_decoder else 0
    return config.data.longest(model.is_encoder_decoder), sources


def live_elements(config: RunConfig, student: Model) -> int:
    """Elements of the student that stay gathered at stage 3."""
    return LIVE_ELEMENTS + PIECE_ELEMENTS if config.zero.live_layers is None else config.zero.live_layers * student.largest_layer


def memory_of(config: RunConfig, world_size: int, device: str = "gpu", models: Models | None = None) -> Memory:
    """The bytes of a rank among `world_size`; on "cpu" (gloo) buffers count as far as they are written to. Raises ConfigError as `read_models` does."""
    models = models or read_models(config)
    student, teacher, stage = models.student, models.teacher, config.zero.student
    on_cpu, samples = device == "cpu", config.train.micro_batch
    number = 2 if config.train.computes_in == "bf16" else 4
    parameters = student.elements + models.scales
    whole, part, words = 4.0 * parameters, 4.0 * parameters / world_size, 4.0 * student.words
    largest = 4.0 * student.largest_tensor
    in_bucket = 4.0 * min(PIECE_ELEMENTS, parameters)
    bucket = in_bucket if on_cpu else 4.0 * PIECE_ELEMENTS
    offloads_optimizer = config.zero.offload_optimizer != "none" and not on_cpu
    offloads_weights = config.zero.offload_parameters != "none" and not on_cpu and stage == 3

    # Between two steps.
    start = {"weights": 0.0 if offloads_weights else part if stage == 3 else whole}
    start |= {} if offloads_optimizer else {"gradients": part} if stage == 3 else {"master weights": part}
    kept = Kept(0.0, 0.0, 0.0, 0.0, 0.0)
    teacher_layers = 0.0
    if teacher is not None and config.teacher is not None:
        kept = teacher.kept_in(config.teacher.dtype)
        start["teacher"] = kept.whole / (world_size if config.zero.teacher == 3 else 1)
        if config.zero.teacher == 3:
            teacher_layers = min(kept.whole, max((config.teacher.live_layers + 1) * kept.layer, kept.words + kept.layer))
        teacher_layers += kept.dense
    if "contrast" in config.distill.teacher_terms and config.distill.contrast is not None:
        rows = student.vocabulary if config.distill.contrast.bank == "vocabulary" else config.data.longest(student.is_encoder_decoder)
        start["contrast bank"] = rows * (4.0 * student.width + 1)
    if not on_cpu:
        start["CUDA, NCCL"] = CONTEXT_BYTES
    rest = start | ({} if offloads_optimizer else {"moments": 2 * part}) | ({"reduction bucket": bucket} if stage == 3 else {})

    # Forward, at its end: the loss.
    in_step = rest | ({"reduction bucket": bucket} if not on_cpu else {})
    gathered = {"gathered weights": 4.0 * min(parameters, max(live_elements(config, student) + student.largest_layer, student.words)) if stage == 3 else 0.0}
    said = {"teacher's outputs": _said(config, teacher, samples) if teacher is not None else 0.0}
    activations = {"activations": activation_bytes(config, student, samples, on_cpu)}
    forward = in_step | gathered | said | activations
    if config.distill.task > 0 or "logits" in config.distill.teacher_terms:
        is_quantized = config.quant is not None and config.quant.embeddings is not None
        heads = (number / 4 * words if is_quantized or number == 2 else 0.0) + (kept.words if config.zero.teacher == 3 else 0.0)
        heads += 2.0 * teacher.words if teacher is not None and number == 2 and kept.words > 2.0 * teacher.words else 0.0
        forward |= {"heads": heads, "head's gradient": words, "loss chunks": _chunks(config, models)}
    of_teacher = in_step | said | {"gathered teacher": teacher_layers}

    # Backward, where most is kept, where most gradients are there, and where they are reduced; gloo works on a copy.
    copies = 2 if on_cpu else 1
    working = 12.0 * samples * config.data.longest(student.is_encoder_decoder) * student.stacks[0].inner + 12.0 * student.largest_matrix
    moments_of_backward = (
        in_step | gathered | said | activations | {"head's gradient": 2 * words, "products of backward": working},
        in_step
        | gathered
        | said
        | {"arriving gradients": {1: whole, 2: in_bucket if on_cpu else 0.0, 3: 0.0}[stage] - (words if stage < 3 else 0), "head's gradient": 4 * words},
        in_step | gathered | {"arriving gradients": {1: whole, 2: (in_bucket if on_cpu else 0.0) + copies * part + largest, 3: copies * in_bucket}[stage]},
    )

    # Update: stage 1 reduces here; AdamW's temporaries, two where it goes tensor by tensor (CPU), else one.
    flat = {1: 2 * part, 2: 2 * part, 3: part}[stage] + largest
    updated = min(part, max(4.0 * PIECE_ELEMENTS, largest / world_size)) if stage == 3 else part  # groups of whole parameters' partitions
    update = rest | {"arriving gradients": flat, "AdamW": 0.0 if offloads_optimizer else copies * updated}
    if stage == 1:
        update = max(update, in_step | {"arriving gradients": whole + copies * part + largest}, key=total_of)

    moments = {
        "start": start,
        "rest": rest,
        "forward": max(forward, of_teacher, key=total_of),
        "backward": max(moments_of_backward, key=total_of),
        "update": update,
    }
    moments = {moment: {name: value for name, value in parts.items() if value > 0} for moment, parts in moments.items()}

    on_disk = config.zero.offload_optimizer == "nvme"
    host = {} if on_disk else {"checkpoint being written": 3 * part}
    host["student while loading"] = whole if stage != 3 else largest
    if teacher is not None:
        host["teacher while loading"] = kept.tensor if config.zero.teacher == 3 else kept.whole
    # On a disk are masters and moments; beside the gradients only what is updated at a time is in memory: masters, both moments, a temporary or two.
    updated = min(part, max(4.0 * DISK_PIECE_ELEMENTS, largest / world_size))
    in_memory = {"weights": part} if offloads_weights and config.zero.offload_parameters == "cpu" else {}
    masters = 0.0 if in_memory else part  # with the weights beside them, one is enough
    host |= {"optimizer": part + 5 * updated if on_disk else 4 * part + masters} if offloads_optimizer else {}
    host |= in_memory
    return Memory(moments, host, part * (3 if on_disk else 2 if config.zero.offload_parameters == "nvme" else 0))


def total_of(parts: Mapping[str, float]) -> float:
    """Bytes of a moment."""
    return sum(parts.values())


def _chunks(config: RunConfig, models: Models) -> float:
    """Bytes of the loss at work: what it holds for one chunk, and the hidden states of both models with the gradient of the student's."""
    student, teacher, logits = models.student, models.teacher, config.distill.logits
    rows = config.train.micro_batch * config.data.longest(student.is_encoder_decoder)
    tensors = 3 if config.distill.task > 0 else 2
    if teacher is not None and logits is not None and logits.weight > 0:
        tensors = 11 if logits.divergence in ("jensen_shannon", "confidence_kl") else 6 if config.distill.task > 0 else 5
    hidden = 4.0 * rows * (3 * student.width + (teacher.width if teacher is not None else 0))
    return tensors * min(CHUNK_BYTES, 4.0 * student.vocabulary * rows) + hidden


def activation_bytes(config: RunConfig, student: Model, samples: int, on_cpu: bool) -> float:
    """Bytes that the student's forward keeps for backward."""
    tokens, sources = lengths(config, student)
    mask_bytes = 4 if on_cpu else 1
    # Autocast's copies of weights are kept too, but those of quantized weights are made again.
    copied = 2 if config.train.computes_in == "bf16" and (config.quant is None or config.quant.linears is None) else 0
    total = 0.0
    for stack, length in zip(student.stacks, (tokens, sources), strict=False):
        kept = samples * kept_by_layer(stack, config, length, sources, mask_bytes) + copied * stack.matrices / stack.layers
        inputs = 4.0 * stack.width * length * samples
        total += stack.layers * inputs + kept if config.train.activation_checkpointing else stack.layers * kept
        total += (3 if stack.rms else 2) * inputs  # the embeddings' mask, the last norm, the hidden states
        if "hidden" in config.distill.teacher_terms:
            total += (stack.layers + 1) * inputs  # differences from the teacher's
        if "attention" in config.distill.teacher_terms:
            total += stack.layers * 4.0 * stack.heads * length * (length + (sources if stack.cross else 0)) * samples
    if "contrast" in config.distill.teacher_terms:
        total += samples * tokens * 4.0 * (4 * student.width + 2 * tokens)
    return total


def _said(config: RunConfig, teacher: Model, samples: int) -> float:
    """Bytes of what the teacher's forward leaves: its last hidden states and what the terms compare."""
    tokens, sources = lengths(config, teacher)
    total = 4.0 * teacher.width * tokens * samples
    layer = config.distill.contrast is not None and config.distill.contrast.layer is not None
    for stack, length in zip(teacher.stacks, (tokens, sources), strict=False):
        if "hidden" in config.distill.teacher_terms or layer:
            total += (stack.layers + 1) * 4.0 * stack.width * length * samples
        if "attention" in config.distill.teacher_terms:
            total += stack.layers * 4.0 * stack.heads * length * (length + (sources if stack.cross else 0)) * samples
    return total
