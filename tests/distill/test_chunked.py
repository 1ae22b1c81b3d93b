"""The loss by chunks against the one with full logits: values, parts and every gradient, and the bytes that it holds."""

import hypothesis
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dqtrain.distill import terms
from dqtrain.distill.chunked import chunked_loss, plain_loss
from dqtrain.models.language import Head, Inputs, LanguageModel

TERMS = {
    "task": lambda s, t, labels: terms.task(s, labels),
    "cross_entropy": lambda s, t, labels: terms.cross_entropy(s, t, 2.0),
    "forward_kl": lambda s, t, labels: terms.forward_kl(s, t),
    "reverse_kl": lambda s, t, labels: terms.reverse_kl(s, t, 0.8),
    "jensen_shannon": lambda s, t, labels: terms.jensen_shannon(s, t, 0.3, 1.5),
    "confidence_kl": lambda s, t, labels: terms.confidence_kl(s, t, 0.7),
    "mse": lambda s, t, labels: terms.mse(s, t),
    "tsld": lambda s, t, labels: terms.tsld(t, labels) * terms.cross_entropy(s, t),
    "entropy": lambda s, t, labels: terms.entropy(t) * terms.forward_kl(s, t),
}


def weighted(*names):
    """A `Function`: the named terms with weights 1, 2, ..."""

    def function(s, t, labels):
        values = {name: TERMS[name](s, t, labels).sum() for name in names}
        return sum((i + 1) * value for i, value in enumerate(values.values())), {name: value.detach() for name, value in values.items()}

    return function


def case(n=13, vocabulary=17, width=5, width_t=7, dtype=torch.float64, bias=False, seed=0, **head):
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw).to(dtype)

    student = Head(tensor(vocabulary, width).requires_grad_(), tensor(vocabulary).requires_grad_() if bias else None, **head)
    teacher = Head(tensor(vocabulary, width_t), tensor(vocabulary) if bias else None)
    return tensor(n, width).requires_grad_(), student, tensor(n, width_t), teacher, [torch.randint(vocabulary, (n,), generator=draw)]


def leaves(hidden, student):
    return [tensor for tensor in (hidden, student.weight, student.bias) if tensor is not None and tensor.requires_grad]


def all_of(loss, inputs, function, **options):
    """Total, parts and the gradients of 0.37 * total."""
    total, parts = loss(*inputs, function, **options)
    return [total.detach(), *parts.values(), *torch.autograd.grad(0.37 * total, leaves(*inputs[:2]))]


def assert_same(inputs, function, rows, tolerance):
    chunk_bytes = rows * len(inputs[1].weight) * 4
    found, expected = (all_of(loss, inputs, function, chunk_bytes=chunk_bytes) for loss in (chunked_loss, plain_loss))
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == reference.dtype and ours.shape == reference.shape and torch.isfinite(ours).all()
        assert (ours - reference).norm() <= tolerance * max(1.0 if tolerance < 1e-8 else 0.0, float(reference.norm()))


HEADS = {
    "bare": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "softcap": 2.5},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 5, 13, 100])
@pytest.mark.parametrize("names", [*TERMS, "all"])
def test_chunks_give_the_loss_the_parts_and_the_gradients_of_full_logits(names, rows, head):
    names = TERMS if names == "all" else (names,)
    assert_same(case(**HEADS[head]), weighted(*names), rows, 1e-10)
    assert_same(case(**HEADS[head], dtype=torch.float32), weighted(*names), rows, 1e-5)


@hypothesis.given(
    n=strategies.integers(0, 9),
    vocabulary=strategies.integers(1, 12),
    width=strategies.integers(1, 6),
    width_t=strategies.integers(1, 6),
    rows=strategies.integers(1, 10),
    bias=strategies.booleans(),
    softcap=strategies.sampled_from([None, 2.0]),
    name=strategies.sampled_from(list(TERMS)),
    seed=strategies.integers(0, 2**31),
)
def test_chunks_equal_full_logits_for_any_shape(n, vocabulary, width, width_t, rows, bias, softcap, name, seed):
    assert_same(case(n, vocabulary, width, width_t, torch.float64, bias, seed, softcap=softcap), weighted(name), rows, 1e-10)


def test_head_is_the_formula():
    hidden, head, *_ = case(bias=True, softcap=1.5)
    x = hidden.detach().numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    assert np.allclose(head.logits(hidden).detach().numpy(), 1.5 * np.tanh(x / 1.5), rtol=0, atol=1e-12)


SMALL = {"vocab_size": 31, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES = {
    "gptj": {"n_embd": 8, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "gemma2": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 8},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
    "bart": {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8}
    | {"decoder_ffn_dim": 8, "max_position_embeddings": 16, "decoder_start_token_id": 0, "forced_eos_token_id": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_that_of_transformers(family):
    config = transformers.AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    torch.manual_seed(0)
    model = (transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM).from_config(config).eval()
    ids, everything = torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        for parameter in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name == "final_logits_bias")):
            parameter.normal_()  # so that no bias is 0, and the softcap is felt
        found = model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})).logits[0]
        ours = LanguageModel(model)
        inputs = Inputs(ids, everything, ids, everything) if config.is_encoder_decoder else Inputs(ids, everything)
        assert torch.allclose(ours.logits(inputs), found, rtol=1e-5, atol=1e-5)
        assert torch.allclose(ours.plain_head().logits(ours(inputs).hidden[0]), found, rtol=1e-5, atol=1e-5)


def test_logits_written_to_given_memory_are_the_same():
    for options in HEADS.values():
        hidden, head, *_ = case(**options)
        with torch.no_grad():
            memory = torch.full((13, 17), torch.nan, dtype=torch.float64)
            assert head.logits(hidden, memory).data_ptr() == memory.data_ptr()
            assert torch.allclose(memory, head.logits(hidden), rtol=0, atol=1e-12)


def test_a_part_may_be_a_view_of_logits():
    inputs = case()

    def function(s, t, labels):
        return s.sum(), {"first": s.detach()[0, 0], "of_teacher": t[-1, -1]}

    _, parts = chunked_loss(*inputs, function, chunk_bytes=5 * 17 * 4)
    logits, taught = inputs[1].logits(inputs[0]), inputs[3].logits(inputs[2])
    assert parts["first"].item() == pytest.approx(logits[::5, 0].sum().item()) and parts["of_teacher"].item() == pytest.approx(
        taught[[4, 9, 12], -1].sum().item()
    )


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1] * 13), (5, [5, 5, 3]), (13, [13]), (100, [13])])
def test_chunks_hold_as_many_rows_as_the_bytes_allow(rows, sizes):
    seen = []

    def function(s, t, labels):
        assert len(s) == len(t) == len(labels)
        seen.append(len(s))
        return s.sum(), {}

    inputs = case()
    chunked_loss(*inputs, function, chunk_bytes=rows * 17 * 4 + 3)
    assert seen == sizes
    seen.clear()
    chunked_loss(*inputs, function, chunk_bytes=1)  # less than a row
    assert seen == [1] * 13


def test_without_teacher_and_without_labels():
    hidden, student, taught, teacher, labels = case()

    def task(s, t, labels):
        assert t is None
        return terms.task(s, labels).sum(), {}

    def soft(s, t):
        return terms.cross_entropy(s, t).sum(), {}

    assert_same((hidden, student, None, None, labels), task, 5, 1e-10)
    assert_same((hidden, student, taught, teacher, []), soft, 5, 1e-10)


class Tied(nn.Module):
    """A model whose embedding is its head."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, dtype=torch.float64)
        self.mix = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, ids, loss, *rest, **options):
        hidden = torch.tanh(self.mix(self.embedding(ids)))
        return loss(hidden, Head(self.embedding.weight), *rest, **options)[0]


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_gradients_of_a_tied_weight_add_up(rows):
    torch.manual_seed(0)
    _, _, taught, teacher, (labels,) = case()
    model, ids = Tied(17, 5), torch.randint(17, (13,))
    gradients = []
    for loss in (chunked_loss, plain_loss):
        model.zero_grad()
        for part in (slice(0, 9), slice(9, 13)):  # as two micro-batches
            model(ids[part], loss, taught[part], teacher, [labels[part]], weighted("task", "forward_kl"), chunk_bytes=rows * 17 * 4).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, reference in zip(*gradients, strict=True):
        assert torch.allclose(ours, reference, rtol=0, atol=1e-10)


def test_a_weight_that_is_computed_passes_its_gradient_on():
    hidden, student, *rest = case()
    scale = torch.full((17, 1), 0.5, dtype=torch.float64, requires_grad=True)
    gradients = []
    for loss in (chunked_loss, plain_loss):
        total, _ = loss(hidden, Head((student.weight * scale).round(decimals=3) * scale), *rest, weighted("task"), chunk_bytes=5 * 17 * 4)
        gradients.append(torch.autograd.grad(total, scale)[0])
    assert torch.allclose(*gradients, rtol=0, atol=1e-10)


def test_no_rows_are_exact_zeros_with_a_graph():
    inputs = case(n=0, bias=True)
    total, parts = chunked_loss(*inputs, weighted(*TERMS))
    assert total.item() == 0 and total.requires_grad
    assert parts.keys() == set(TERMS) and all(value.item() == 0 for value in parts.values())
    for gradient, tensor in zip(torch.autograd.grad(total, leaves(*inputs[:2])), leaves(*inputs[:2]), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_does_no_gradient_work(off):
    inputs = case()
    function = weighted("task", "forward_kl")
    expected, expected_parts = plain_loss(*inputs, function)

    def watched(s, t, labels):
        assert not torch.is_grad_enabled() and not s.requires_grad
        return function(s, t, labels)

    with off():
        total, parts = chunked_loss(*inputs, watched, chunk_bytes=5 * 17 * 4)
    assert not total.requires_grad and torch.allclose(total, expected, rtol=1e-12)
    for name, value in parts.items():
        assert torch.allclose(value, expected_parts[name], rtol=1e-12)


@pytest.mark.parametrize("trained", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_gradients_are_made_only_for_what_is_trained(trained):
    inputs = case(bias=True)
    tensors = (inputs[0], inputs[1].weight, inputs[1].bias)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor):
        total, _ = chunked_loss(*inputs, weighted("task"), chunk_bytes=5 * 17 * 4)
    assert total.requires_grad == bool(trained)
    if not trained:
        return
    # The hooks see what the chunks' own graphs keep, too; those that outlive the call come last.
    assert saved[len(saved) - len(trained) :] == [tuple(tensors[i].shape) for i in trained]
    total.backward()
    plain, _ = plain_loss(*inputs, weighted("task"))
    for tensor, gradient in zip((tensors[i] for i in trained), torch.autograd.grad(plain, [tensors[i] for i in trained]), strict=True):
        assert torch.allclose(tensor.grad, gradient, rtol=0, atol=1e-10)
    assert all(tensor.grad is None for i, tensor in enumerate(tensors) if i not in trained)


def test_gradients_are_handed_out_once():
    inputs = case()
    total, _ = chunked_loss(*inputs, weighted("task"))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    total, _ = chunked_loss(*inputs, weighted("task"))
    (gradient,) = torch.autograd.grad(total, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def relative(found, reference):
    return float((found.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_under_autocast_products_are_bf16_and_all_else_is_fp32(rows, head):
    inputs = case(n=40, vocabulary=50, width=16, width_t=24, dtype=torch.float32, **HEADS[head])
    function = weighted("task", "forward_kl")

    def watched(s, t, labels):
        assert s.dtype == t.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return function(s, t, labels)

    exact = all_of(plain_loss, inputs, function)
    with torch.autocast("cpu", torch.bfloat16):
        assert inputs[1].logits(inputs[0]).dtype == torch.float32
        assert torch.equal(inputs[1].logits(inputs[0]), Head(inputs[1].weight.bfloat16(), *inputs[1][1:]).logits(inputs[0]))
        ours = all_of(chunked_loss, inputs, watched, chunk_bytes=rows * 50 * 4)
        plain = all_of(plain_loss, inputs, watched)
    for found, reference, true in zip(ours, plain, exact, strict=True):
        assert found.dtype == torch.float32
        assert relative(found, true) <= 1.5 * relative(reference, true) + 1e-3  # as right as autograd's
        assert relative(found, reference) < 0.02
    assert relative(ours[0], exact[0]) > 1e-7  # bf16 was there


def test_half_precision_heads_and_doubles_under_autocast():
    hidden, student, taught, teacher, labels = case(dtype=torch.float32)
    half = Head(student.weight.detach().bfloat16().requires_grad_())
    total, _ = chunked_loss(hidden, half, taught, Head(teacher.weight.bfloat16()), labels, weighted("task", "forward_kl"), chunk_bytes=5 * 17 * 4)
    total.backward()
    assert total.dtype == torch.float32 and half.weight.grad.dtype == torch.bfloat16 and hidden.grad.dtype == torch.float32
    exact, _ = plain_loss(hidden, student, taught, teacher, labels, weighted("task", "forward_kl"))
    assert relative(half.weight.grad, torch.autograd.grad(exact, student.weight)[0]) < 0.02
    with torch.autocast("cpu", torch.bfloat16):  # which leaves doubles alone
        assert_same(case(bias=True), weighted("task", "forward_kl"), 5, 1e-10)


def bytes_of(loss, n, chunk_bytes, function, **head):
    """Peak of bytes allocated while the loss and its gradients are made, and those left of it before backward, by the allocator's own count."""
    inputs = case(n, 2000, 24, 16, torch.float32, **head)
    loss(*inputs, function, chunk_bytes=chunk_bytes)[0].backward()  # what is allocated once for all
    for tensor in leaves(*inputs[:2]):
        tensor.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        total, _ = loss(*inputs, function, chunk_bytes=chunk_bytes)
        held = torch.zeros(1)  # a mark between forward and backward
        total.backward()
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    marks = [i for i, change in enumerate(changes) if change == held.untyped_storage().nbytes()]
    alive, level = [], 0
    for change in changes:
        level += change
        alive.append(level)
    return max(alive), alive[marks[-1]], inputs


ROWS = 16
CHUNK = ROWS * 2000 * 4


@pytest.mark.parametrize("head", ["bare", "all"])
def test_memory_beyond_the_gradients_does_not_grow_with_the_tokens(head):
    function = weighted("task", "cross_entropy")
    beyond = []
    for n in (ROWS, 4 * ROWS, 32 * ROWS, 32 * ROWS + 3):
        peak, left, inputs = bytes_of(chunked_loss, n, CHUNK, function, **HEADS[head])
        gradients = sum(tensor.nbytes for tensor in leaves(*inputs[:2]))
        assert gradients <= left <= gradients + 1000  # the total and the parts
        beyond.append(peak - gradients)
    assert max(beyond) - min(beyond) <= 0.01 * CHUNK
    assert max(beyond) < 9 * CHUNK
    peak, _, _ = bytes_of(plain_loss, 32 * ROWS, CHUNK, function, **HEADS[head])
    assert peak > 32 * 5 * CHUNK  # the meter sees full logits where there are some


@pytest.mark.parametrize("name", TERMS)
def test_no_term_takes_more_than_a_dozen_chunks(name):
    peak, _, inputs = bytes_of(chunked_loss, 4 * ROWS, CHUNK, weighted(name))
    assert peak - sum(tensor.nbytes for tensor in leaves(*inputs[:2])) < 12 * CHUNK


def test_memory_under_autocast_is_that_of_the_chunk_and_of_both_heads_in_bf16():
    def loss(*arguments, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return chunked_loss(*arguments, **options)

    beyond = []
    for n in (ROWS, 32 * ROWS):
        peak, left, inputs = bytes_of(loss, n, CHUNK, weighted("task", "cross_entropy"))
        gradients = sum(tensor.nbytes for tensor in leaves(*inputs[:2]))
        assert gradients <= left <= gradients + 1000
        beyond.append(peak - gradients - (inputs[1].weight.nbytes + inputs[3].weight.nbytes) // 2)
    assert abs(beyond[1] - beyond[0]) <= 0.05 * CHUNK and max(beyond) < 10 * CHUNK
