"""The whole loss against one written from its docstrings: transformers' own forwards in float64, loops over samples and positions, no chunks."""

import copy
import math

import pytest
import torch
from families import FAMILIES
from torch import nn

from dqtrain.config import Attention, Contrast, Distill, Hidden, Logits, Quant, WeightQuant
from dqtrain.distill.objective import Objective, needed_outputs
from dqtrain.models.language import Inputs, LanguageModel, Taught
from dqtrain.models.layers import LayerMaps
from dqtrain.quant.modules import quantize_model

SAMPLES, TOKENS, SOURCES, WORDS = 3, 9, 7, 97
SIZES = {  # of student and teacher
    "gpt2": ({"n_layer": 2}, {"n_layer": 3}),
    "bart": ({"decoder_layers": 2, "encoder_layers": 1}, {"decoder_layers": 3, "encoder_layers": 2}),
    "t5": ({"num_decoder_layers": 2, "num_layers": 1}, {"num_decoder_layers": 3, "num_layers": 2}),
}
MAPS = LayerMaps((0, 2), (1,))
BETA = 0.35  # measured, where the settings give none


def new(family, side):
    """Student (0) or teacher (1) in fp32, far from each other and from 0."""
    model = FAMILIES[family](**SIZES[family][side])
    torch.manual_seed(side + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.ndim > 1 else 1).add_(0.1 * torch.randn_like(p))
    return model.eval()


def micro_batch(family, seed=0):
    """(Inputs, labels): all targets, padding behind six, and a prompt before the last three; sources of 7, 5 and 2."""
    draw = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(WORDS, (SAMPLES, TOKENS), generator=draw) for _ in range(2))
    labels[1, 6:], labels[2, :4], labels[2, 7:] = -100, -100, -100
    if family == "gpt2":
        return Inputs(ids, labels != -100), labels
    source = torch.randint(WORDS, (SAMPLES, SOURCES), generator=draw)
    return Inputs(ids, labels != -100, source, torch.arange(SOURCES) < torch.tensor([[7], [5], [2]])), labels


def objective_of(model, settings, precision="fp32"):
    maps = MAPS if model.config.is_encoder_decoder else LayerMaps(MAPS.decoder)
    return Objective(LanguageModel(model, precision, **needed_outputs(settings)), settings, maps, 2 * TOKENS, BETA)


@torch.no_grad()
def taught_by(teacher, inputs, settings):
    module = LanguageModel(teacher, **needed_outputs(settings))
    return Taught(module(inputs), module.plain_head())


def found_by(objective, teacher, inputs, labels, taught=None):
    """(total, parts, gradients by name) of one micro-batch."""
    loss = objective(inputs, labels, taught or taught_by(teacher, inputs, objective.settings))
    objective.zero_grad()
    loss.total.backward()
    prefix = "student.model."
    gradients = {name.removeprefix(prefix): p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return loss.total.item(), {name: value.item() for name, value in loss.parts.items()}, gradients


# --- the reference


def said_by(model, inputs):
    """transformers' own words, with eager attention: logits, and (states, attentions, cross) of decoder and encoder."""
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    if inputs.source_ids is None:
        said = model(input_ids=inputs.ids, **wanted)
        return said.logits, (said.hidden_states, said.attentions, ()), ((), (), ())
    said = model(input_ids=inputs.source_ids, attention_mask=inputs.source_is_real.long(), decoder_input_ids=inputs.ids, **wanted)
    decoder = (said.decoder_hidden_states, said.decoder_attentions, said.cross_attentions)
    return said.logits, decoder, (said.encoder_hidden_states, said.encoder_attentions, ())


def divergence(s, t, settings):
    """Between the distributions of two rows of logits."""
    if settings.divergence == "mse":
        return sum((s[v] - t[v]) ** 2 for v in range(len(s))) / len(s)
    q, p = (torch.exp(x / settings.temperature) / torch.exp(x / settings.temperature).sum() for x in (s, t))

    def kl(a, b):
        return (a * (a / b).log()).sum()

    if settings.divergence == "cross_entropy":
        value = -(p * q.log()).sum()
    elif settings.divergence == "forward_kl":
        value = kl(p, q)
    elif settings.divergence == "reverse_kl":
        value = kl(q, p)
    elif settings.divergence == "jensen_shannon":
        beta = 0.5 if settings.beta is None else settings.beta
        mixture = beta * p + (1 - beta) * q
        value = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    else:
        beta = BETA if settings.beta is None else settings.beta
        value = beta * kl(q, p) + (1 - beta) * kl(p, q)
    return value * settings.temperature**2


def distance(s, t, kind):
    if kind == "mse":
        return ((s - t) ** 2).sum() / len(s)
    cosine = (s * t).sum() / (t * t).sum().sqrt() / (s * s).sum().sqrt()
    return 1 - cosine if kind == "cosine" else 2 - 2 * cosine


class Reference:
    """The loss of one run: what moves once per step is `mean`, of the weights of tokens, and `bank`."""

    def __init__(self, student, teacher, settings):
        self.student, self.teacher, self.settings = copy.deepcopy(student).double(), copy.deepcopy(teacher).double(), settings
        self.mean, self.bank, self.weights, self.met = 1.0, {}, [], {}

    def __call__(self, inputs, labels, sampled=None):
        """(total, parts, gradients by name)."""
        settings, samples = self.settings, range(len(labels))
        s, t = said_by(self.student, inputs), [None] * 3
        if settings.teacher_terms:
            with torch.no_grad():
                t = said_by(self.teacher, inputs)
        targets = [[i for i in range(labels.shape[1]) if labels[b, i] != -100] for b in samples]
        number = sum(map(len, targets))
        everywhere = settings.padding_counts
        decoded = [(b, i) for b in samples for i in (range(labels.shape[1]) if everywhere else targets[b])]
        share = number / len(decoded) if everywhere else 1.0
        total, parts = 0.0, {}

        def of_decoder(value):
            return share * sum((value(b, i) for b, i in decoded), torch.zeros((), dtype=torch.float64))

        def of_encoder(value):
            """Mean over a sample's sources, for each target; over all of the micro-batch where padding counts."""
            length = inputs.source_ids.shape[1]
            real = [[j for j in range(length) if everywhere or inputs.source_is_real[b, j]] for b in samples]
            means = [sum(value(b, j) for j in real[b]) / len(real[b]) for b in samples]
            return sum(means) / len(means) * number if everywhere else sum(len(targets[b]) * means[b] for b in samples)

        def add(name, weight, value):
            nonlocal total
            total, parts[name] = total + weight * value, value.item()

        if settings.task:
            add("task", settings.task, sum((-s[0][b, i].log_softmax(-1)[labels[b, i]] for b in samples for i in targets[b]), 0 * s[0].sum()))
        if settings.logits is not None and settings.logits.weight and sampled:
            rows = {place: n for n, place in enumerate((b, i) for b in samples for i in targets[b])}
            add("logits", settings.logits.weight, of_decoder(lambda b, i: self.of_ids(s[0][b, i], *(x[rows[b, i]] for x in sampled))))
        elif settings.logits is not None and settings.logits.weight:
            value = of_decoder(lambda b, i: self.weight(t[0][b, i], labels[b, i]) * divergence(s[0][b, i], t[0][b, i], settings.logits))
            add("logits", settings.logits.weight, value)
        if settings.hidden is not None and settings.hidden.weight:
            kind, value = settings.hidden.distance, 0.0
            for places, side, kept in ((of_decoder, 1, MAPS.decoder), (of_encoder, 2, MAPS.encoder))[: 1 + (inputs.source_ids is not None)]:
                for n, layer in enumerate((-1, *kept)):
                    a, b = s[side][0][n], t[side][0][layer + 1]
                    value = value + places(lambda x, y, a=a, b=b: distance(a[x, y], b[x, y], kind))
            if settings.hidden.last_encoder_state_by_sample and inputs.source_ids is not None:
                a, b = s[2][0][-1], t[2][0][-1]
                for x in samples:
                    real = [y for y in range(a.shape[1]) if everywhere or inputs.source_is_real[x, y]]
                    value = value + number * sum(distance(a[x, y], b[x, y], kind) for y in real) / len(real)
            add("hidden", settings.hidden.weight, value)
        if settings.attention is not None and settings.attention.weight:
            add("attention", settings.attention.weight, self.attention(s, t, inputs, of_decoder, of_encoder, targets))
        if settings.contrast is not None and settings.contrast.weight:
            layer = settings.contrast.layer
            ours, theirs = (s[1][0][-1], t[1][0][-1]) if layer is None else (s[1][0][layer + 1], t[1][0][MAPS.decoder[layer] + 1])
            add("contrast", settings.contrast.weight, self.contrast(ours, theirs, inputs.ids.tolist(), targets))
        names, parameters = zip(*self.student.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        return total.item(), parts, {name: g for name, g in zip(names, gradients, strict=True) if g is not None}

    def weight(self, t, label):
        kind, p = self.settings.logits.tokens, t.softmax(-1)
        if kind == "equal":
            return 1.0
        # A padded position has no label that could surprise the teacher.
        weight = float(-(p * p.log()).sum()) if kind == "entropy" else math.exp(-float(p[label].log()) / 10) if label != -100 else 1.0
        self.weights.append(weight)
        return weight / self.mean

    def of_ids(self, s, ids, shares):
        return -sum(shares[k].double() * s.log_softmax(-1)[ids[k]] for k in range(len(ids)))

    def attention(self, s, t, inputs, of_decoder, of_encoder, targets):
        def of_query(a, b, keys):
            def value(x, y):
                heads = range(a.shape[1])
                return sum(((a[x, h, y, keys[x]] - b[x, h, y, keys[x]]) ** 2).sum() for h in heads) / len(heads) / len(keys[x])

            return value

        everywhere, value = self.settings.padding_counts, 0.0
        length = inputs.ids.shape[1]
        own = [list(range(length if everywhere else max(found, default=0) + 1)) for found in targets]
        for n, layer in enumerate(MAPS.decoder):
            value = value + of_decoder(of_query(s[1][1][n], t[1][1][layer], own))
        if inputs.source_ids is not None:
            source = [[j for j in range(inputs.source_ids.shape[1]) if everywhere or inputs.source_is_real[b, j]] for b in range(len(targets))]
            for n, layer in enumerate(MAPS.decoder):
                value = value + of_decoder(of_query(s[1][2][n], t[1][2][layer], source))
            for n, layer in enumerate(MAPS.encoder):
                value = value + of_encoder(of_query(s[2][1][n], t[2][1][layer], source))
        return value

    def contrast(self, ours, theirs, ids, targets):
        """With all other target tokens of the sequence as negatives."""
        settings, value = self.settings.contrast, 0 * ours.sum()

        def smoothed(b, i):
            m = settings.momentum
            return m * self.bank[ids[b][i]] + (1 - m) * ours[b, i] if ids[b][i] in self.bank else ours[b, i]

        for b, places in enumerate(targets):
            for i in places:
                keys = [theirs[b, i]]
                for j in places:
                    if j != i:
                        keys.append(theirs[b, j] if settings.negatives_from == "teacher" else smoothed(b, j).detach())
                scores = torch.stack([nn.functional.cosine_similarity(smoothed(b, i), key, dim=0) / settings.temperature for key in keys])
                value = value - scores.log_softmax(0)[0]
                self.met.setdefault(ids[b][i], []).append(ours[b, i].detach())
        return value

    def end_step(self):
        if self.weights:
            now = sum(self.weights) / len(self.weights)
            self.mean = 0.9 * self.mean + 0.1 * now
        for word, states in self.met.items():
            now = sum(states) / len(states)
            m = self.settings.contrast.momentum
            self.bank[word] = m * self.bank[word] + (1 - m) * now if word in self.bank else now
        self.weights, self.met = [], {}


def assert_same(found, expected, tolerance=1e-4):
    """Totals, parts, and the gradient of every weight, relative to the largest one."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance / 10)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=tolerance / 10), name
    largest = max(float(g.abs().max()) for g in expected[2].values())
    assert largest > 0
    for name, gradient in expected[2].items():
        error = float((found[2].get(name, torch.zeros_like(gradient)) - gradient).abs().max())
        assert error <= tolerance * max(float(gradient.abs().max()), 1e-2 * largest), name
    assert all(float(found[2][name].abs().max()) <= tolerance * largest for name in found[2].keys() - expected[2].keys())


DIVERGENCES = {
    "cross_entropy": Logits(weight=1.3, temperature=2.0),
    "forward_kl": Logits(weight=1.3, divergence="forward_kl", temperature=0.7),
    "reverse_kl": Logits(weight=1.3, divergence="reverse_kl", temperature=1.5),
    "jensen_shannon": Logits(weight=1.3, divergence="jensen_shannon", beta=0.2, temperature=2.0),
    "jensen_shannon, half": Logits(weight=1.3, divergence="jensen_shannon"),
    "confidence_kl": Logits(weight=1.3, divergence="confidence_kl", beta=0.8, temperature=1.5),
    "confidence_kl, measured": Logits(weight=1.3, divergence="confidence_kl"),
    "mse": Logits(weight=1.3, divergence="mse"),
}
CONTRAST = Contrast(weight=0.4, temperature=0.2, negatives=TOKENS)  # all of them: nothing is drawn
EVERYTHING = Distill(task=0.7, logits=DIVERGENCES["jensen_shannon"], hidden=Hidden(weight=0.6), attention=Attention(weight=30.0), contrast=CONTRAST)
DQ_BART = Distill(task=1.0, logits=Logits(weight=0.8, divergence="mse"), hidden=Hidden(weight=3.0), attention=Attention(weight=3.0))
QUIRK = Hidden(weight=3.0, last_encoder_state_by_sample=True)
CASES = {"task": Distill(task=0.7), "everything": EVERYTHING, "DQ-BART": DQ_BART}
CASES |= {f"logits: {name}": Distill(logits=logits) for name, logits in DIVERGENCES.items()}
CASES |= {f"hidden: {kind}": Distill(hidden=Hidden(weight=0.6, distance=kind)) for kind in ("mse", "normalised_mse", "cosine")}
CASES |= {"attention": Distill(attention=Attention(weight=30.0)), "contrast": Distill(contrast=CONTRAST)}
CASES |= {"contrast of layer 0": Distill(contrast=CONTRAST.model_copy(update={"layer": 0, "negatives_from": "student"}))}
CASES |= {"contrast of layer 1": Distill(contrast=CONTRAST.model_copy(update={"layer": 1}))}
CASES |= {"padding counts": DQ_BART.model_copy(update={"padding_counts": True, "contrast": CONTRAST})}
CASES |= {"last encoder state by sample": DQ_BART.model_copy(update={"hidden": QUIRK})}
CASES |= {"the published code": DQ_BART.model_copy(update={"hidden": QUIRK, "padding_counts": True})}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", SIZES)
def test_losses_and_gradients_are_those_of_the_reference(family, case):
    student, teacher, settings = new(family, 0), new(family, 1), CASES[case]
    inputs, labels = micro_batch(family)
    expected = Reference(student, teacher, settings)(inputs, labels)
    found = found_by(objective_of(student, settings), teacher, inputs, labels)
    assert found[1].keys() == {*(["task"] if settings.task else []), *settings.teacher_terms}
    assert all(abs(value) > 1e-3 for value in found[1].values())
    assert_same(found, expected)


def sgd(module, gradients, rate):
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in gradients:
                p -= rate * gradients[name]


@pytest.mark.parametrize("tokens", ["tsld", "entropy"])
@pytest.mark.parametrize("family", SIZES)
def test_three_steps_of_two_micro_batches(family, tokens):
    """The mean of the weights of tokens and the bank move once per step; an evaluation between them moves nothing."""
    settings = Distill(logits=Logits(weight=1.3, divergence="forward_kl", tokens=tokens), contrast=CONTRAST)
    student, teacher = new(family, 0), new(family, 1)
    reference, objective = Reference(student, teacher, settings), objective_of(student, settings).train()
    assert float(objective.token_weights.mean) == 1
    for step in range(3):
        sums = []
        for j in range(2):
            inputs, labels = micro_batch(family, seed=2 * step + j)
            expected, found = reference(inputs, labels), found_by(objective, teacher, inputs, labels)
            assert_same(found, expected, 1e-3)
            sums.append((found[2], expected[2]))
            objective.eval()
            with torch.no_grad():
                inputs, labels = micro_batch(family, seed=100)
                objective(inputs, labels, taught_by(teacher, inputs, settings))
            objective.train()
        for ours, theirs in sums:
            sgd(objective.student.model, ours, 1e-3)
            sgd(reference.student, theirs, 1e-3)
        objective.end_step()
        reference.end_step()
        assert float(objective.token_weights.mean) == pytest.approx(reference.mean, rel=1e-5)
        assert set(objective.contrast.touched.nonzero()[:, 0].tolist()) == set(reference.bank)
    assert {"token_weights.mean", "contrast.bank", "contrast.touched"} <= objective.state_dict().keys()


def test_a_step_without_targets_moves_no_mean():
    settings = Distill(logits=Logits(tokens="tsld"))
    teacher, objective = new("gpt2", 1), objective_of(new("gpt2", 0), settings).train()
    objective.end_step()
    assert float(objective.token_weights.mean) == 1
    inputs, labels = micro_batch("gpt2")
    found_by(objective, teacher, inputs, labels)
    objective.end_step()
    mean = float(objective.token_weights.mean)
    found_by(objective, teacher, *without_targets(inputs, labels))
    objective.end_step()
    assert mean > 1 and float(objective.token_weights.mean) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("family", SIZES)
def test_sampled_ids_in_place_of_the_teacher(family):
    settings = Distill(task=0.5, logits=Logits(weight=1.3))
    student, teacher = new(family, 0), new(family, 1)
    inputs, labels = micro_batch(family)
    number = int(inputs.is_target.sum())
    torch.manual_seed(0)
    sampled = torch.randint(WORDS, (number, 5)), torch.rand(number, 5).softmax(-1)
    expected = Reference(student, teacher, settings)(inputs, labels, sampled)
    objective = objective_of(student, settings)
    assert_same(found_by(objective, teacher, inputs, labels, Taught(ids=sampled[0], shares=sampled[1])), expected)
    module = LanguageModel(teacher)
    with torch.no_grad():
        p = module.logits(inputs).softmax(-1)
    every_id = Taught(ids=torch.arange(WORDS).expand(number, -1), shares=p)
    assert_same(found_by(objective, teacher, inputs, labels, every_id), found_by(objective, teacher, inputs, labels))


# --- what must not change anything


def float_student(family, bits=None):
    model = new(family, 0)
    if bits:
        weights = WeightQuant(bits=bits, granularity="per_row")
        quantize_model(model, Quant(linears=weights, embeddings=weights, positions=weights, activations=None))
    return model


def part_of(inputs, labels, rows, trim=False):
    """Some samples of a micro-batch; `trim`: without padding that all of them have."""
    tokens, sources = labels.shape[1], inputs.source_ids.shape[1] if inputs.source_ids is not None else 0
    if trim:
        tokens = int(inputs.is_real[rows].sum(1).max())
        sources = int(inputs.source_is_real[rows].sum(1).max()) if sources else 0
    source = (inputs.source_ids[rows, :sources], inputs.source_is_real[rows, :sources]) if sources else ()
    return Inputs(inputs.ids[rows, :tokens], inputs.is_target[rows, :tokens], *source), labels[rows, :tokens]


def padded(inputs, labels):
    """Twice as wide, filled up with any ids."""

    def wider(x, value=None):
        return torch.cat([x, torch.randint_like(x, WORDS) if value is None else torch.full_like(x, value)], 1)

    torch.manual_seed(9)
    source = (wider(inputs.source_ids), wider(inputs.source_is_real, False)) if inputs.source_ids is not None else ()
    return Inputs(wider(inputs.ids), wider(inputs.is_target, False), *source), wider(labels, -100)


def without_targets(inputs, labels):
    return inputs._replace(is_target=torch.zeros_like(inputs.is_target)), torch.full_like(labels, -100)


def added(results):
    parts = {name: sum(parts[name] for _, parts, _ in results) for name in results[0][1]}
    return sum(total for total, _, _ in results), parts, {name: sum(gradients[name] for _, _, gradients in results) for name in results[0][2]}


INVARIANT = {
    "everything": EVERYTHING,
    "others": Distill(
        logits=Logits(divergence="reverse_kl", tokens="entropy"),
        hidden=Hidden(distance="cosine"),
        attention=Attention(weight=30.0),
        contrast=CONTRAST.model_copy(update={"layer": 0, "negatives_from": "student", "bank": "position"}),
    ),
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("case", INVARIANT)
@pytest.mark.parametrize("family", SIZES)
def test_padding_order_and_micro_batches_change_no_sum(family, case, bits):
    teacher, settings = new(family, 1), INVARIANT[case]
    objective = objective_of(float_student(family, bits), settings)
    batch = micro_batch(family)
    expected = found_by(objective, teacher, *batch)
    longest = Inputs(*padded(*batch)[0]).ids.shape[1]
    assert longest == 2 * TOKENS
    assert_same(found_by(objective, teacher, *padded(*batch)), expected)
    assert_same(found_by(objective, teacher, *part_of(*batch, torch.tensor([2, 0, 1]))), expected)
    for trim in (False, True):
        parts = [found_by(objective, teacher, *part_of(*batch, torch.tensor(rows), trim)) for rows in ([1, 2], [0])]
        assert_same(added(parts), expected)
    empty = found_by(objective, teacher, *without_targets(*batch))
    assert_same(added([expected, empty]), expected)


@pytest.mark.parametrize("case", ["everything", "task", "hidden: mse", "attention", "contrast", "logits: mse", "the published code"])
@pytest.mark.parametrize("family", SIZES)
def test_a_micro_batch_without_targets_is_0_and_keeps_its_graph(family, case):
    settings, teacher = CASES[case], new(family, 1)
    objective = objective_of(new(family, 0), settings)
    batch = micro_batch(family)
    usual = found_by(objective, teacher, *batch)
    total, parts, gradients = found_by(objective, teacher, *without_targets(*batch))
    assert total == 0 and parts == dict.fromkeys(usual[1], 0.0)
    assert gradients.keys() == usual[2].keys()  # every parameter that others wait for, under ZeRO
    assert all(not gradient.any() for gradient in gradients.values())


# --- what is computed


@pytest.mark.parametrize(
    ("settings", "states", "attentions"),
    [
        (Distill(task=1.0), False, False),
        (Distill(logits=Logits()), False, False),
        (Distill(hidden=Hidden()), True, False),
        (Distill(attention=Attention()), False, True),
        (Distill(contrast=Contrast()), False, False),
        (Distill(contrast=Contrast(layer=0)), True, False),
        (Distill(task=1.0, contrast=Contrast(layer=0, weight=0.0)), False, False),
        (Distill(task=1.0, hidden=Hidden(weight=0.0), attention=Attention(weight=0.0)), False, False),
        (Distill(hidden=Hidden(), attention=Attention()), True, True),
    ],
)
def test_outputs_that_live_terms_need(settings, states, attentions):
    assert needed_outputs(settings) == {"states": states, "attentions": attentions}


def test_weight_zero_is_not_computed():
    off = {"logits": Logits(weight=0.0, tokens="tsld"), "hidden": Hidden(weight=0.0), "attention": Attention(weight=0.0), "contrast": Contrast(weight=0.0)}
    settings = Distill(task=0.7, **off)
    objective = objective_of(new("bart", 0), settings)
    assert objective.contrast is None and objective.token_weights is None and not list(objective.buffers(recurse=False))
    assert objective.student.wanted == {"output_hidden_states": False, "output_attentions": False}
    inputs, labels = micro_batch("bart")
    with_teacher = found_by(objective, new("bart", 1), inputs, labels)
    alone = objective(inputs, labels, None)
    assert with_teacher[1].keys() == alone.parts.keys() == {"task"} and alone.total.item() == with_teacher[0]
    settings = Distill(hidden=Hidden(), attention=Attention(), contrast=CONTRAST)
    objective = objective_of(new("bart", 0), settings)
    _, parts, gradients = found_by(objective, new("bart", 1), inputs, labels)
    assert parts.keys() == {"hidden", "attention", "contrast"} and "model.encoder.layers.0.fc1.weight" in gradients


@pytest.mark.parametrize("family", SIZES)
def test_bf16_is_near_fp32(family):
    student, teacher = new(family, 0), new(family, 1)
    batch = micro_batch(family)
    exact = found_by(objective_of(student, EVERYTHING), teacher, *batch)
    near = found_by(objective_of(student, EVERYTHING, "bf16"), teacher, *batch)
    assert near[1].keys() == exact[1].keys() and near[0] != exact[0]
    for name, value in exact[1].items():
        assert near[1][name] == pytest.approx(value, rel=0.1), name
    flat = [torch.cat([found[2][name].flatten() for name in exact[2]]) for found in (near, exact)]
    assert nn.functional.cosine_similarity(*flat, dim=0) > 0.95 and all(g.dtype == torch.float32 for g in near[2].values())


def test_opt_whose_head_is_narrower_than_its_layers():
    """OPT-350m: hidden states as the head reads them are not as wide as config.hidden_size."""
    student, teacher = (FAMILIES["opt"](num_hidden_layers=layers).eval() for layers in (1, 2))
    inputs, labels = micro_batch("gpt2")
    for layer in (None, 0):
        settings = Distill(hidden=Hidden(), contrast=CONTRAST.model_copy(update={"layer": layer}))
        objective = Objective(LanguageModel(student, **needed_outputs(settings)), settings, LayerMaps((1,)), TOKENS)
        total, _, _ = found_by(objective, teacher, inputs, labels)
        assert math.isfinite(total)
        objective.end_step()
