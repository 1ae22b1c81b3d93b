"""The stored words of a teacher are those that it says itself, to the last bit; whatever is not them is refused."""

import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import prepare_one, write_corpus
from families import FAMILIES

from dqtrain.config import Pairs, Train, Zero
from dqtrain.config import Teacher as Settings
from dqtrain.data.stream import PairStream, Stream
from dqtrain.distill import cache
from dqtrain.distill.cache import CachedTeacher, cache_folder, write_cache
from dqtrain.distill.terms import cross_entropy, sampled_cross_entropy
from dqtrain.engine import TeacherEngine
from dqtrain.errors import DataError
from dqtrain.models.language import LanguageModel, inputs_of
from dqtrain.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
COMMAND = "dqtrain cache-teacher mine.yaml"


def settings_of(source, draws=50):
    return Settings(path=Path("unused"), source=source, draws=draws)


HIDDEN = settings_of("hidden")


def teacher(family="gpt2", **keys):
    model = FAMILIES[family](vocab_size=300, **keys).eval()
    model.config.final_logit_softcapping = 5.0 if family == "llama" else None  # as Gemma 2 has it
    if family == "bart":
        torch.nn.init.normal_(model.final_logits_bias)
    return TeacherEngine(LanguageModel(model), Train(steps=1, global_batch=1, micro_batch=1, lr=1.0), Zero(teacher=0), ALONE)


@pytest.fixture(scope="session")
def text(world, tmp_path_factory):
    """155 samples: two parts and a bit."""
    folder = tmp_path_factory.mktemp("text")
    return prepare_one(str(write_corpus(folder / "train.jsonl", 78, 3)), "train", world / "tokenizer", folder)


@pytest.fixture(scope="session")
def stream(text):
    return Stream(text, 16, seed=1, shuffle=False)


@pytest.fixture(scope="session")
def pairs(world, tmp_path_factory):
    """70 pairs of every length."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(0)
    lines = [{"source": "the cat " * draw.randrange(1, 9), "target": "sees " * draw.randrange(1, 12)} for _ in range(70)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = prepare_one(str(folder / "train.jsonl"), "train", world / "tokenizer", folder, pairs=Pairs(source_tokens=16, target_tokens=12), encoder_decoder=True)
    return PairStream(made, 1, 2, 1, False)


def write(folder, online, stream, settings=HIDDEN, micro_batch=8, seed=1, dtype=torch.float32, progress=None):
    return write_cache(folder, settings, online, stream, micro_batch, seed, dtype, ALONE, progress)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def said(cached, stream, samples):
    """(what is stored of some samples, Inputs)."""
    batch = stream.batch(samples)
    inputs, _ = inputs_of(batch, CPU)
    with cached.teaching(batch, inputs) as taught:
        return taught, inputs


def logits(taught, inputs):
    return taught.head.logits(taught.outputs.hidden[inputs.is_target])


@pytest.fixture(scope="session")
def hidden(tmp_path_factory, stream):
    folder = tmp_path_factory.mktemp("store") / "teacher-hidden-0"
    write(folder, teacher(), stream)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bart", "t5"])
def test_hidden_states_give_the_teachers_own_logits(family, stream, pairs, tmp_path):
    data = pairs if family in ("bart", "t5") else stream
    online = teacher(family)
    about = write(tmp_path / "teacher-hidden-0", online, data)
    cached = CachedTeacher(tmp_path / "teacher-hidden-0", COMMAND, CPU)
    num_tokens = 0
    for start in range(0, data.num_samples, 8):
        samples = range(start, min(start + 8, data.num_samples))
        (theirs, inputs), (ours, _) = said(online, data, samples), said(cached, data, samples)
        num_tokens += int(inputs.is_target.sum())
        assert ours.outputs.hidden.shape == theirs.outputs.hidden.shape
        assert (ours.outputs.hidden[~inputs.is_target] == 0).all()
        if data is stream and len(samples) == 8:  # those of pairs were in batches of other widths
            assert torch.equal(logits(ours, inputs), logits(theirs, inputs))
        torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), atol=1e-5, rtol=1e-5)
    assert cached.figures() == {}
    assert about["num_samples"] == data.num_samples and about["num_tokens"] == num_tokens and about["num_ids"] == 0
    assert about["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "teacher-hidden-0").glob("*.safetensors"))


def test_samples_are_found_in_any_order_and_batch(hidden, text, stream):
    cached, online = CachedTeacher(hidden, COMMAND, CPU), teacher()
    shuffled = Stream(text, 16, seed=9, shuffle=True)
    for samples in (range(5, 11), range(stream.num_samples - 3, stream.num_samples + 3)):  # into the second epoch
        (ours, inputs), (theirs, _) = said(cached, shuffled, samples), said(online, shuffled, samples)
        torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), atol=1e-5, rtol=1e-5)


def test_a_rank_without_work_reads_nothing(hidden, stream, tmp_path):
    write(tmp_path / "teacher-top_k-0", teacher(), stream, settings_of("top_k", draws=3))
    for folder in (hidden, tmp_path / "teacher-top_k-0"):
        batch = stream.batch(range(2))
        batch = batch.without_targets()
        with CachedTeacher(folder, COMMAND, CPU).teaching(batch, inputs_of(batch, CPU)[0]) as taught:
            if taught.outputs is not None:
                assert taught.outputs.hidden.shape == (2, 16, 32)
            else:
                assert taught.ids.shape == taught.shares.shape == (0, 1)


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_the_micro_batch_decides_rounding_alone(micro_batch, hidden, stream, tmp_path):
    calls = []
    write(tmp_path / hidden.name, teacher(), stream, micro_batch=micro_batch, progress=lambda *call: calls.append(call))
    forwards = 2 * -(-64 // min(micro_batch, 64)) + -(-(stream.num_samples - 128) // min(micro_batch, 64))
    assert calls == [(done, forwards) for done in range(1, forwards + 1)]
    ours, theirs = (CachedTeacher(folder, COMMAND, CPU) for folder in (tmp_path / hidden.name, hidden))
    states = [said(cached, stream, range(stream.num_samples))[0].outputs.hidden for cached in (ours, theirs)]
    torch.testing.assert_close(*states, atol=1e-6, rtol=1e-5)


def test_bf16_hidden_states_are_half_the_bytes(hidden, stream, tmp_path):
    write(tmp_path / hidden.name, teacher(), stream, dtype=torch.bfloat16)
    (ours, inputs), (theirs, _) = (said(CachedTeacher(folder, COMMAND, CPU), stream, range(9)) for folder in (tmp_path / hidden.name, hidden))
    assert torch.equal(ours.outputs.hidden, theirs.outputs.hidden.bfloat16().float())
    assert torch.equal(ours.head.weight, theirs.head.weight)


def probabilities(online, stream, samples):
    taught, inputs = said(online, stream, samples)
    return logits(taught, inputs).double().softmax(-1)


def spread(taught, num_words):
    """Shares of every word: [target tokens, vocabulary]."""
    return torch.zeros(len(taught.ids), num_words, dtype=torch.float64).scatter_add_(1, taught.ids, taught.shares.double())


@pytest.mark.parametrize("draws", [50, 4096])
def test_drawn_ids_are_unbiased(draws, stream, tmp_path):
    """Loss and gradient of thousands of tokens are those of the whole distribution, give or take what chance explains."""
    online, samples = teacher(), range(stream.num_samples)
    torch.nn.init.normal_(online.module.model.transformer.wte.weight, std=0.3)  # surer of itself than a new model
    about = write(tmp_path / "teacher-sampled-0", online, stream, settings_of("sampled", draws), seed=5)
    taught, _ = said(CachedTeacher(tmp_path / "teacher-sampled-0", COMMAND, CPU), stream, samples)
    p = probabilities(online, stream, samples)
    shares = spread(taught, 300)
    assert torch.equal((shares * draws).round().sum(1), torch.full((len(p),), draws, dtype=torch.float64))
    num_ids = (taught.shares > 0).sum(1)
    assert torch.equal((shares > 0).sum(1), num_ids) and about["num_ids"] == num_ids.sum()  # no id twice
    assert float(num_ids.double().mean()) == pytest.approx(float((1 - (1 - p) ** draws).sum(-1).mean()), rel=0.02)

    student = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sampled, exact = sampled_cross_entropy(student, taught.ids, taught.shares), cross_entropy(student, p.log())
    ours, theirs = (torch.autograd.grad(loss.sum(), student)[0] for loss in (sampled, exact))
    nats = -student.detach().log_softmax(-1)
    deviations = ((p * nats**2).sum(-1) - (p * nats).sum(-1) ** 2, p * (1 - p))
    for difference, variance, often in ((sampled - exact, deviations[0], ...), (ours - theirs, deviations[1], p > 10 / draws)):
        z = (difference.detach() / (variance / draws).sqrt())[often]
        assert len(z.flatten()) > 2000 and z.mean().abs() < 4 / len(z) ** 0.5 and z.square().mean() == pytest.approx(1, abs=0.1) and z.abs().max() < 7


def test_drawn_ids_follow_from_seed_and_sample_alone(stream, tmp_path):
    settings = settings_of("sampled", draws=20)
    stores = []
    for number, (seed, micro_batch) in enumerate([(3, 1), (3, 7), (4, 7)]):
        folder = tmp_path / str(number) / "teacher-sampled-0"
        write(folder, teacher(), stream, settings, micro_batch, seed)
        stores.append(spread(said(CachedTeacher(folder, COMMAND, CPU), stream, range(stream.num_samples))[0], 300))
    assert torch.equal(stores[0], stores[1]) and not torch.equal(stores[1], stores[2])


@pytest.mark.parametrize("draws", [4, 1000])
def test_likeliest_ids_with_their_probabilities(draws, stream, tmp_path):
    online = teacher()
    about = write(tmp_path / "teacher-top_k-0", online, stream, settings_of("top_k", draws=draws))
    assert about["num_ids"] == min(draws, 300) * about["num_tokens"]
    taught, _ = said(CachedTeacher(tmp_path / "teacher-top_k-0", COMMAND, CPU), stream, range(8))
    shares, ids = probabilities(online, stream, range(8)).topk(min(draws, 300))
    torch.testing.assert_close(taught.shares.double(), shares, atol=1e-6, rtol=1e-5)
    assert torch.equal(taught.ids[:, :4], ids[:, :4])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("source", ["hidden", "sampled"])
def test_killed_anywhere_it_goes_on_and_ends_the_same(source, stream, tmp_path):
    settings, whole, folder = settings_of(source), tmp_path / f"a/teacher-{source}-0", tmp_path / f"b/teacher-{source}-0"
    about = write(whole, teacher(), stream, settings)
    for kill_at in (9, 1, 8, 20):

        def kill(done, of, kill_at=kill_at):
            if done == kill_at:
                raise Killed

        if kill_at <= 12:  # the last one ends
            with pytest.raises(Killed):
                write(folder, teacher(), stream, settings, progress=kill)
            with pytest.raises(DataError, match=rf"teacher-{source}-0: what the teacher says .* not to the end\. Run `{COMMAND}`"):
                CachedTeacher(folder, COMMAND, CPU)
            (folder / f".part-{kill_at:05d}.safetensors.host.1").write_bytes(b"torn")
        else:
            assert write(folder, teacher(), stream, settings) == about
    assert content(folder) == content(whole)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    write(folder, teacher(), stream, settings, progress=lambda *_: pytest.fail("nothing is to be done"))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("part-*")} == before


def everything(folder, stream):
    taught, inputs = said(CachedTeacher(folder, COMMAND, CPU), stream, range(stream.num_samples))
    return logits(taught, inputs) if taught.head else spread(taught, 300)


@pytest.mark.parametrize("source", ["hidden", "sampled"])
def test_no_changed_byte_is_read(source, stream, tmp_path):
    """Any byte of the header, the tables or the content: an error that says what to do, or the very same words."""
    folder, draw = tmp_path / f"teacher-{source}-0", random.Random(0)
    write(folder, teacher(n_embd=4), stream, settings_of(source, draws=4))
    sound = everything(folder, stream)
    paths = [folder / "part-00002.safetensors"] + [folder / "head.safetensors"] * (source == "hidden")
    for path in paths:
        kept = path.read_bytes()
        header = 8 + int.from_bytes(kept[:8], "little")
        same = 0
        for place in draw.sample(range(header), 200) + draw.sample(range(header, len(kept)), 60):
            path.write_bytes(kept[:place] + bytes([kept[place] ^ 1 << draw.randrange(8)]) + kept[place + 1 :])
            try:
                assert torch.equal(everything(folder, stream), sound)
                same += 1
            except DataError as error:
                assert str(path) in str(error) and f"Delete it and run `{COMMAND}`" in str(error)
        assert same < 20  # spaces and the like
        for size in (0, 7, header, len(kept) // 2, len(kept) - 1):
            path.write_bytes(kept[:size])
            with pytest.raises(DataError, match=r"is damaged .* Delete it and run"):
                everything(folder, stream)
        path.unlink()
        with pytest.raises(DataError, match=rf"1 files, such as {path.name}, are missing\. Run `{COMMAND}`"):
            everything(folder, stream)
        write(folder, teacher(n_embd=4), stream, settings_of(source, draws=4))
        assert path.read_bytes() == kept


def test_swapped_and_foreign_files_are_refused(hidden, stream, tmp_path):
    def store(name):
        return shutil.copytree(hidden, tmp_path / name / hidden.name)

    swapped = store("swapped")
    first, second = (swapped / f"part-0000{i}.safetensors" for i in range(2))
    first.rename(swapped / "x"), second.rename(first), (swapped / "x").rename(second)
    with pytest.raises(DataError, match="part-00000.safetensors is damaged"):
        everything(swapped, stream)
    foreign = tmp_path / "foreign" / "teacher-hidden-1"
    write(foreign, teacher(), stream)
    shutil.copy(hidden / "part-00001.safetensors", foreign)
    with pytest.raises(DataError, match="part-00001.safetensors is damaged"):
        everything(foreign, stream)
    for text in ("", "{", "[]", "{}"):
        broken = store(f"index{len(text)}{text[:1] == '['}")
        (broken / "index.json").write_text(text)
        with pytest.raises(DataError, match="index.json is damaged .* Delete it and run"):
            everything(broken, stream)
        write(broken, teacher(), stream)
        assert content(broken) == content(hidden)
    with pytest.raises(DataError, match=r"teacher-hidden-2: .*What is there \(teacher-hidden-1\) is of another teacher or setting"):
        CachedTeacher(foreign.with_name("teacher-hidden-2"), COMMAND, CPU)


def test_a_full_disk_is_one_message_and_loses_no_part(stream, hidden, tmp_path):
    folder, limits = tmp_path / hidden.name, resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (hidden / "part-00002.safetensors").stat().st_size
    shutil.copytree(hidden, folder, ignore=shutil.ignore_patterns("part-00001*", "index*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(DataError, match=r"part-00001.safetensors cannot be written \(File too large\); free space"):
            write(folder, teacher(), stream)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in folder.iterdir()) == ["head.safetensors", "part-00000.safetensors", "part-00002.safetensors"]
    write(folder, teacher(), stream)
    assert content(folder) == content(hidden)


def test_the_folder_is_named_after_everything_that_decides_its_content(text, tmp_path):
    FAMILIES["gpt2"](vocab_size=300).save_pretrained(tmp_path / "model")
    weights, layout = tmp_path / "model/model.safetensors", {"tokens_per_sample": 16, "decoder_start_token_id": None}

    def name(source="sampled", shards=text, draws=50, layout=layout, seed=1, precision="fp32", dtype="fp32"):
        settings = settings_of(source, draws).model_copy(update={"dtype": dtype})
        return cache_folder([shards], settings, tmp_path / "model", layout, seed, precision)

    first = name()
    assert first.parent == text and first.name.startswith("teacher-sampled-") and name() == first
    changed = [name(draws=51), name(layout={**layout, "tokens_per_sample": 17}), name(seed=2), name(precision="bf16"), name("hidden"), name("top_k")]
    changed += [name(dtype=dtype) for dtype in ("bf16", "int8")]
    for path, place in ((weights, -1), (tmp_path / "model/config.json", 0), (text / "index.json", None)):
        kept = path.read_bytes()
        if place is None:
            path.write_text(path.read_text().replace('"tokenizer_hash": "', '"tokenizer_hash": "0'))
        else:
            path.write_bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place:][1:])
        changed.append(name())
        path.write_bytes(kept)
    index = json.loads((text / "index.json").read_text())
    other = shutil.copytree(text, tmp_path / text.name)
    index["shards"][0]["checksum"] = "0" * 16
    (other / "index.json").write_text(json.dumps(index))
    changed.append(text / name(shards=other).name)
    assert len({first, *changed}) == 1 + len(changed) == 13
    assert name("hidden", seed=2, draws=3) == name("hidden") and name("top_k", seed=2) == name("top_k")
    (tmp_path / "model/README.md").write_text("nothing that decides")
    assert name() == first
    assert cache.VERSION == 1
