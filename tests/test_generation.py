"""Generation equals searches written here without cache, padding or batches; scores equal values by hand. As a program, one rank of a world of two."""

import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import sacrebleu
import torch
from engine_worker import run_as_ranks
from families import BART, FAMILIES
from pydantic import ValidationError
from rouge_score import rouge_scorer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dqtrain.config import Generation, Quant, WeightQuant
from dqtrain.errors import ConfigError, DataError
from dqtrain.generation import check_generation, generate, score, write_predictions
from dqtrain.quant.modules import quantize_model
from dqtrain.world import World, init_world

VOCAB, END, PAD, START = 16, 0, 1, 2
ALONE = World(0, 1, 0, torch.device("cpu"))
SOURCES = ["w3 w4 w5 w6 w7", "w9", "w12 w3", "w3 w4 w5 w6 w7 w8 w9 w10", "w15 w15 w4", "w4 w3 w12", "w7 w5"]


def tokenizer(template="$A"):
    """Words w3 to w15 and three special tokens; `template` says which of these are put around a text."""
    names = ["</s>", "<pad>", "<s>"] + [f"w{i}" for i in range(3, VOCAB)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", START), ("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", bos_token="<s>", pad_token="<pad>", clean_up_tokenization_spaces=False)


def model_of(family, **changes):
    """Of 16 words, with weights large enough that texts differ and end by themselves."""
    model = FAMILIES[family](vocab_size=VOCAB, tie_word_embeddings=False, **changes)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.eval()


def write(model, sources=SOURCES, words=None, micro_batch=3, world=ALONE, source_tokens=9, synced=False, progress=None, precision="fp32", **settings):
    settings = Generation(**{"max_new_tokens": 10, **settings})
    words = words or tokenizer()
    return generate(
        model,
        words,
        sources,
        settings,
        source_tokens=source_tokens,
        micro_batch=micro_batch,
        world=world,
        synced=synced,
        progress=progress,
        precision=precision,
    )


def ids_of(source):
    return [int(word[1:]) for word in source.split()]


def text_of(ids):
    return " ".join(f"w{i}" for i in itertools.takewhile(lambda i: i != END, ids) if i > 2)


@torch.no_grad()
def next_log_probs(model, read, written):
    """log p(next word) [vocabulary]: one row, everything read anew."""
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id, *written]])
        return model(input_ids=torch.tensor([read]), decoder_input_ids=start, use_cache=False).logits[0, -1].log_softmax(-1)
    return model(input_ids=torch.tensor([read + written]), use_cache=False).logits[0, -1].log_softmax(-1)


def greedy(model, read, max_new_tokens=10, min_new_tokens=0, no_repeat=0):
    written = []
    while len(written) < max_new_tokens and (not written or written[-1] != END):
        likely = next_log_probs(model, read, written).argsort(descending=True).tolist()
        if len(written) < min_new_tokens:
            likely.remove(END)
        seen = {tuple(written[i : i + no_repeat]) for i in range(len(written) - no_repeat + 1)}
        written.append(next(word for word in likely if not no_repeat or (*written, word)[-no_repeat:] not in seen))
    return text_of(written)


def read_by(model, source):
    return ids_of(source) + [END] * model.config.is_encoder_decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_a_plain_loop(family, capfd):
    model = model_of(family)
    texts = write(model)
    assert texts == [greedy(model, read_by(model, source)) for source in SOURCES]
    assert len(set(texts)) > 2 and len({len(text.split()) for text in texts}) > 1
    assert write(model, min_new_tokens=6) == [greedy(model, read_by(model, source), min_new_tokens=6) for source in SOURCES]
    for size in (1, 2):
        ours = write(model, no_repeat_ngram_size=size, min_new_tokens=4)
        assert ours == [greedy(model, read_by(model, source), min_new_tokens=4, no_repeat=size) for source in SOURCES]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (3, 1)])
def test_encoder_and_decoder_of_unequal_depth(encoder, decoder):
    model = model_of("t5", num_layers=encoder, num_decoder_layers=decoder)
    assert write(model) == [greedy(model, read_by(model, source)) for source in SOURCES]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_a_beam_as_wide_as_the_tree_finds_the_best_text(family, length_penalty, capfd):
    """Of all texts of up to 3 tokens: log p / length ** length_penalty, the end of text counted."""
    model = model_of(family)

    def best(read):
        found = {}
        for depth in range(3):
            for written in itertools.product(range(1, VOCAB), repeat=depth):
                if depth and written[:-1] not in sums:
                    continue
                before = sums[written[:-1]][written[-1]] if depth else 0.0
                sums[written] = (before + next_log_probs(model, read, list(written))).tolist()
                found[(*written, END)] = sums[written][END] / (depth + 1) ** length_penalty
                if depth == 2:
                    found |= {(*written, i): sums[written][i] / 3**length_penalty for i in range(1, VOCAB)}
        return text_of(max(found, key=found.__getitem__))

    texts = write(model, SOURCES[:2], num_beams=VOCAB**2, max_new_tokens=3, length_penalty=length_penalty)
    expected = []
    for source in SOURCES[:2]:
        sums = {}
        expected.append(best(read_by(model, source)))
    assert texts == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize(
    "search", [{}, {"num_beams": 3}, {"num_beams": 4, "early_stopping": True, "length_penalty": 4.0}, {"num_beams": 3, "length_penalty": -1.0}]
)
def test_order_and_batches_of_the_sources_decide_nothing(family, search):
    model = model_of(family)
    rounds = []
    texts = write(model, **search, progress=lambda done, of: rounds.append((done, of)))
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    assert write(model, SOURCES[::-1], **search) == texts[::-1]
    assert write(model, **search, micro_batch=1) == write(model, **search, micro_batch=100) == texts
    assert write(model, [SOURCES[0], *SOURCES], **search) == [texts[0], *texts]
    assert write(model, []) == []


def test_early_stopping_and_beams_reach_the_search():
    model = model_of("llama")
    assert write(model, num_beams=3) != write(model)
    assert write(model, num_beams=3, length_penalty=-4.0) != write(model, num_beams=3, length_penalty=4.0)
    assert write(model, num_beams=3, early_stopping=True, length_penalty=4.0) != write(model, num_beams=3, length_penalty=4.0)


def test_the_models_own_settings_stay_out():
    model = model_of("bart")
    texts, beams = write(model), write(model, num_beams=3)
    own = GenerationConfig(
        num_beams=4,
        no_repeat_ngram_size=1,
        max_length=4,
        min_length=3,
        forced_eos_token_id=END,
        forced_bos_token_id=START,
        early_stopping=True,
        length_penalty=3.0,
        repetition_penalty=3.0,
        suppress_tokens=[3, 4, 5],
        do_sample=True,
        temperature=9.0,
    )
    model.generation_config = own
    before = own.to_dict()
    assert write(model) == texts
    assert write(model, num_beams=3) == beams
    assert model.generation_config is own and own.to_dict() == before
    with pytest.raises(IndexError):
        write(model, progress=lambda done, of: [][done])
    assert model.generation_config is own


def test_the_language_that_a_model_starts_with_is_kept():
    model = model_of("mbart")
    model.generation_config.forced_bos_token_id = 7
    assert all(text.split()[0] == "w7" for text in write(model))


def test_a_decoder_may_start_with_the_end_of_text():
    model = model_of("bart", decoder_start_token_id=END)
    texts = write(model, no_repeat_ngram_size=1)
    assert texts == [greedy(model, read_by(model, source), no_repeat=1) for source in SOURCES]
    assert any(texts)


def test_sources_are_read_as_in_training():
    """Special tokens as the tokenizer puts them, the end kept where a source is cut; causal models get none, and the end of a source."""
    bart, llama = model_of("bart"), model_of("llama")
    around = tokenizer("<s> $A </s>")
    source = "w3 w4 w5 w6 w7 w8 w9 w10"
    assert write(bart, [source], around) == [greedy(bart, [START, *range(3, 11), END][:7] + [END])]
    assert write(bart, [source], around, source_tokens=10) == [greedy(bart, [START, *range(3, 11), END])]
    assert write(bart, [source], tokenizer("<s> $A"), source_tokens=5) == [greedy(bart, [START, 3, 4, 5, END])]
    assert write(llama, [source], around, source_tokens=3) == [greedy(llama, [8, 9, 10])]


def test_without_a_token_for_padding_the_end_of_text_pads():
    words = tokenizer()
    words.pad_token = None
    for family in ("gpt2", "bart"):
        model = model_of(family)
        assert write(model, words=words, num_beams=2) == write(model, num_beams=2)
        assert write(model, words=words, no_repeat_ngram_size=1) == write(model, no_repeat_ngram_size=1)


def test_modes_and_generators_are_given_back():
    model = model_of("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    texts = write(model)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    dropped = write(model, dropout=True)
    torch.manual_seed(17)
    state = torch.get_rng_state()
    assert dropped != texts and dropped == write(model, dropout=True)
    assert write(model) == texts
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_is_the_precision_of_training():
    model = model_of("bart")
    seen = set()
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    write(model, precision="bf16")
    assert seen == {torch.bfloat16}


def test_texts_beyond_the_models_positions_are_refused():
    model = model_of("gpt2")  # 32 positions
    assert write(model, ["w3 " * 40], source_tokens=25, max_new_tokens=8, min_new_tokens=8) == [greedy(model, [3] * 25, 8, 8)]
    with pytest.raises(
        ConfigError, match=r"eval\.generation\.max_new_tokens is 9 behind the 25 of data\.pairs\.source_tokens, .* 32 positions; set it to 8 or"
    ):
        write(model, source_tokens=25, max_new_tokens=9)
    with pytest.raises(ConfigError, match="set source_tokens below 32"):
        write(model, source_tokens=33)
    bart = model_of("bart")
    assert BART["max_position_embeddings"] == 32
    assert write(bart, ["w3 " * 40], source_tokens=32, max_new_tokens=32, min_new_tokens=32) == [greedy(bart, [3] * 31 + [END], 32, 32)]
    with pytest.raises(ConfigError, match=r"data\.pairs\.source_tokens is 33, but the model has 32 positions; set it to 32"):
        check_generation(bart.config, Generation(max_new_tokens=1), 33)
    with pytest.raises(ConfigError, match=r"max_new_tokens is 33, but the model has 32 positions; set it to 32"):
        check_generation(bart.config, Generation(max_new_tokens=33), 32)
    check_generation(FAMILIES["t5"]().config, Generation(max_new_tokens=10**5), 10**5)
    with pytest.raises(ValidationError, match=r"min_new_tokens is 5, more than max_new_tokens, 4"):
        Generation(max_new_tokens=4, min_new_tokens=5)


def test_a_source_without_a_token_is_named():
    with pytest.raises(DataError, match="makes no token of the source ` `"):
        write(model_of("gpt2"), ["w3", " "])
    bart = model_of("bart")
    assert write(bart, [" "]) == [greedy(bart, [END])]


# --- two ranks ---

CASES = {f"{family}-{stage}": (family, stage) for family in ("bart", "llama") for stage in (0, 3)}
SEARCHES = {"greedy": {"micro_batch": 1}, "beams": {"micro_batch": 2, "num_beams": 3, "length_penalty": 2.0}, "one": {"sources": SOURCES[:1]}}


def quantized(family):
    model = model_of(family)
    four = WeightQuant(bits=4, grid="minmax", granularity="per_row")
    quantize_model(model, Quant(linears=four, embeddings=four, positions=None, activations=None))
    return model


def one_rank(folder):
    """What a rank writes in each case -> RANK.json, and how many rounds and forwards it made."""
    import deepspeed

    world = init_world()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found = {}
    for name, (family, stage) in CASES.items():
        model = quantized(family)
        if stage == 3:
            config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
            engine, *_ = deepspeed.initialize(model=model, config=config)
            assert all(parameter.numel() == 0 for parameter in model.parameters())
        forwards = []
        model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        for search, settings in SEARCHES.items():
            texts = write(model, world=world, synced=stage == 3, **settings)
            found[f"{name}-{search}"] = (texts, len(forwards))
        if stage == 3:
            engine.destroy()
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # after the barrier nobody waits for this rank


def test_two_ranks_write_what_one_does(tmp_path):
    run_as_ranks([sys.executable, __file__, str(tmp_path)], 2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name, (family, stage) in CASES.items():
        model = quantized(family)
        for search, settings in SEARCHES.items():
            (texts, forwards), (texts_too, forwards_too) = (part[f"{name}-{search}"] for part in found)
            assert texts == texts_too == write(model, **settings), (name, search)
            if stage == 3:
                assert forwards == forwards_too
    assert found[0]["llama-0-greedy"][1] != found[1]["llama-0-greedy"][1]  # where they need not wait for each other


# --- scores ---


def test_rouge_by_hand():
    """the cat sat | the cat ran: 2 of 3 words, 1 of 2 pairs, "the cat" in order; BLEU: no 4-gram, smoothed."""
    scores = score(["the cat sat"], [["the cat ran"]])
    assert scores["rouge1"] == pytest.approx(200 / 3)
    assert scores["rouge2"] == pytest.approx(50)
    assert scores["rougeL"] == scores["rougeLsum"] == pytest.approx(200 / 3)
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"]
    assert all(type(value) is float for value in scores.values())


def test_words_are_stemmed_and_every_reference_may_win():
    assert score(["running cats"], [["runs a cat"]])["rouge1"] == pytest.approx(100 * 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    several = [["a b", "x y z"], ["p q", "p q r s"]]
    # First: 2PR/(P+R) with x y z is 2*(1/1)*(1/3)/(4/3) = 1/2, with a b 0. Second: p q is found whole.
    scores = score(["x", "p q"], several)
    assert scores["rouge1"] == pytest.approx((50 + 100) / 2)
    assert scores["rouge2"] == pytest.approx((0 + 100) / 2)


def test_a_reference_wins_by_each_metrics_own_measure():
    """All words in another order, or half of them in the same one."""
    scores = score(["b a c d"], [["a b d c", "x a c y"]])
    assert scores["rouge1"] == pytest.approx(100)
    assert scores["rouge2"] == pytest.approx(100 / 3)  # a c, of the second
    assert scores["rougeL"] == pytest.approx(50)


def test_sentences_are_lines_for_rouge_lsum():
    """Swapped sentences: each is found by itself, but not in order."""
    first, second = "one two three.", "Four five six!"
    scores = score([f"{second} {first}"], [[f"{first} {second}"]])
    assert scores["rougeL"] == pytest.approx(50)
    assert scores["rougeLsum"] == pytest.approx(100)
    assert score([f"{second}\n{first}"], [[f"{first} {second}"]])["rougeLsum"] == pytest.approx(100)
    # Lines that are there are the sentences: the full stop in the middle splits nothing.
    scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    text, reference = "a b. c d\ne f", "c d\na b. e f"
    assert score([text], [[reference]])["rougeLsum"] == pytest.approx(100 * scorer.score(reference, text)["rougeLsum"].fmeasure)


def test_bleu_by_hand():
    """Precisions 5/6, 3/5, 1/4 and, smoothed, 1/2 of 0/3 -> 1/6; equal lengths, no brevity penalty."""
    scores = score(["the cat sat on the mat"], [["the cat lay on the mat"]])
    assert scores["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)


def test_scores_are_those_of_the_libraries_for_references_of_unequal_number():
    predictions = ["The Vaults is a cheap pub near Café Adriatic.", "Aromi is family friendly . It serves Chinese food .", "", "Cocum"]
    references = [
        ["The Vaults pub near Café Adriatic has a 5 star rating.", "Close to Café Adriatic, The Vaults has a rating of 5. Prices start at £30."],
        ["Aromi is a family friendly Chinese restaurant."],
        ["Nothing is said.", "Nobody speaks.", "Silence!"],
        ["Cocum", ""],
    ]
    scores = score(predictions, references)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [max(scorer.score(r, p)[name].fmeasure for r in several) for p, several in zip(predictions, references, strict=True)]
        assert scores[name] == pytest.approx(100 * sum(best) / 4)
    # The same corpus with references repeated instead of left out: a repeated one changes neither clipped counts nor the closest length.
    repeated = [(several * 3)[:3] for several in references]
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [list(stream) for stream in zip(*repeated, strict=True)]).score)
    assert 0 < scores["bleu"] < 100


def test_nothing_written_scores_nothing(capfd):
    assert score(["", ""], [["a b c"], ["d e f"]]) == dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"), 0.0)
    score(["it is so ."] * 200, [["it is so ."]] * 200)
    assert capfd.readouterr() == ("", "")


def test_predictions_are_lines_of_json(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, ["a\n", "ü"], [["x"], ["y", "z"]], ["p", 'q"\u2028'])
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert rows == [
        {"source": "a\n", "prediction": "p", "references": ["x"]},
        {"source": "ü", "prediction": 'q"\u2028', "references": ["y", "z"]},
    ]
    with pytest.raises(ValueError):
        write_predictions(path, ["a"], [["x"]], [])
    assert len(path.read_bytes().splitlines()) == 2 and [entry.name for entry in tmp_path.iterdir()] == ["predictions.jsonl"]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    one_rank(Path(sys.argv[1]))
