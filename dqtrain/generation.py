"""Text that a model writes for the sources of pairs, and how near it is to their references: ROUGE and BLEU.

Greedy or beam search by transformers' `generate`, shared out over the ranks; ROUGE by rouge-score (Lin 2004,
https://aclanthology.org/W04-1013), BLEU by sacrebleu (Papineni et al. 2002; Post 2018, https://aclanthology.org/W18-6319).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.generation.streamers import BaseStreamer

from dqtrain.config import Generation, Pairs, Source
from dqtrain.data.corpus import references
from dqtrain.data.prepare import encode_sources
from dqtrain.errors import ConfigError
from dqtrain.files import write_text
from dqtrain.world import World, gather_objects


def check_generation(config: PretrainedConfig, settings: Generation, source_tokens: int) -> None:
    """Raise ConfigError when the longest source and text do not fit the model's positions."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return
    if config.is_encoder_decoder and source_tokens > longest:
        raise ConfigError(f"data.pairs.source_tokens is {source_tokens}, but the model has {longest} positions; set it to {longest} or less.")
    # The last token is never read; a decoder reads its start token instead, a causal model the source.
    before = 1 if config.is_encoder_decoder else source_tokens
    if before + settings.max_new_tokens - 1 > longest:
        behind = "" if config.is_encoder_decoder else f" behind the {source_tokens} of data.pairs.source_tokens"
        most = longest + 1 - before
        mend = f"set it to {most} or less" if most > 0 else f"set source_tokens below {longest}"
        raise ConfigError(f"eval.generation.max_new_tokens is {settings.max_new_tokens}{behind}, but the model has {longest} positions; {mend}.")


@dataclass(frozen=True)
class Writing:
    """What text is generated from, and how: the sources of pairs, each once, with all their references."""

    tokenizer: Any
    corpora: dict[str, tuple[Source, ...]]  # by split
    pairs: Pairs
    settings: Generation
    micro_batch: int
    precision: str
    world: World
    synced: bool  # the model's weights are partitioned

    def scores(
        self, model: PreTrainedModel, split: str, limit: int | None = None, out: Path | None = None, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Scores (`score`) of what a model writes for the first `limit` sources of a split; rank 0 leaves the texts in `out`. Collective."""
        several = references(self.corpora[split], split, self.pairs)[:limit]
        sources = [self.pairs.template.replace("{source}", source) for source, _ in several]
        texts = generate(
            model,
            self.tokenizer,
            sources,
            self.settings,
            source_tokens=self.pairs.source_tokens,
            micro_batch=self.micro_batch,
            world=self.world,
            precision=self.precision,
            synced=self.synced,
            progress=progress,
        )
        if out is not None and self.world.rank == 0:
            write_predictions(out, sources, [targets for _, targets in several], texts)
        return score(texts, [targets for _, targets in several])


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    sources: Sequence[str],
    settings: Generation,
    *,
    source_tokens: int,
    micro_batch: int,
    world: World,
    precision: str = "fp32",
    synced: bool = False,
    progress: Callable[[int, int], None] | None = None,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The text that a model writes for each source (template applied), in order, on every rank. Collective.

    A source is what training reads (`data.prepare.encode_sources`). Sources of similar length share a batch of `micro_batch`, and batch k
    is the work of rank k mod world_size: the text depends on neither the number of ranks nor the order of the sources, and on
    `micro_batch` by rounding alone. `synced`: the weights are partitioned (ZeRO-3), and every rank makes the same forwards. `precision` is
    that of training. The model writes in eval mode and gets its modes back, but with `settings.dropout` it stays in the mode it has;
    dropout draws by batch. `progress` is called with (rounds done, rounds), and `streamer` is transformers' own, for one source without beams. Raises ConfigError as `check_generation`, and DataError for a
    source without a token.
    """
    check_generation(model.config, settings, source_tokens)
    if not sources:
        return []
    is_encoder_decoder = model.config.is_encoder_decoder
    encoded = encode_sources(tokenizer, sources, source_tokens, is_encoder_decoder)
    order = sorted(range(len(sources)), key=lambda i: (-len(encoded[i]), encoded[i]))  # by content, so that the order given decides nothing
    batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    rounds = math.ceil(len(batches) / world.world_size)
    search = _search(model, tokenizer, settings)
    whole_model: Any = model
    own_search, modes = model.generation_config, [(module, module.training) for module in model.modules()]
    written: dict[int, str] = {}
    try:
        # transformers fills what a search leaves open with the model's own settings: BART's 4 beams, a text's largest length.
        model.generation_config = GenerationConfig()
        if not settings.dropout:
            model.eval()
        for index in range(rounds):
            number = index * world.world_size + world.rank
            batch = batches[min(number, len(batches) - 1)]  # a rank without work left does the shortest batch once more, in step with the others
            ids, mask = _padded([encoded[i] for i in batch], search.pad_token_id, left=not is_encoder_decoder)
            begin = 1 if is_encoder_decoder else ids.shape[1]
            ngrams = [_NoRepeat(settings.no_repeat_ngram_size, begin)] if settings.no_repeat_ngram_size else []
            # Under ZeRO-3 autocast's cache would keep the bf16 copy of every weight that is gathered.
            autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=not synced)
            # transformers sizes T5's cache by its encoder, which may have fewer layers than the decoder.
            cache = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if is_encoder_decoder else {}
            with autocast, _seeded(number, world.device) if settings.dropout else nullcontext():
                ended = whole_model.generate(
                    ids.to(world.device),
                    attention_mask=mask.to(world.device),
                    generation_config=search,
                    logits_processor=LogitsProcessorList(ngrams),
                    synced_gpus=synced and world.world_size > 1,
                    streamer=streamer,
                    **cache,
                )
            if number < len(batches):
                texts = tokenizer.batch_decode(ended[:, begin:], skip_special_tokens=True)
                written |= dict(zip(batch, texts, strict=True))
            if progress:
                progress(index + 1, rounds)
    finally:
        model.generation_config = own_search
        for module, training in modes:
            module.training = training
    everything = {i: text for part in gather_objects(written) for i, text in part.items()}
    return [everything[i] for i in range(len(sources))]


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """How near texts are to their references (one or more of each): rouge1, rouge2, rougeL, rougeLsum and bleu, all from 0 to 100.

    ROUGE is the mean over the texts of the F-measure of stemmed words, against the reference that gives the best one; rougeLsum takes a
    sentence per line, or ends them at `.`, `!` and `?`. BLEU is that of the whole corpus against all references, with sacrebleu's own tokenisation.
    """
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scorer_of_lines = RougeScorer(["rougeLsum"], use_stemmer=True)
    sums = dict.fromkeys((*scorer.rouge_types, *scorer_of_lines.rouge_types), 0.0)
    for prediction, several in zip(predictions, references, strict=True):
        best = scorer.score_multi(several, prediction)
        best |= scorer_of_lines.score_multi([_lines(text) for text in several], _lines(prediction))
        for name, value in best.items():
            sums[name] += value.fmeasure
    # sacrebleu wants the first reference of every text, then the second, ...; None where a text has no more.
    streams: list[list[Any]] = [[several[i] if i < len(several) else None for several in references] for i in range(max(map(len, references)))]
    bleu = BLEU(force=True).corpus_score(predictions, streams)  # force: no warning about text that looks tokenised
    return {name: 100 * value / len(predictions) for name, value in sums.items()} | {"bleu": bleu.score}


def write_predictions(path: Path, sources: Sequence[str], references: Sequence[Sequence[str]], predictions: Sequence[str]) -> None:
    """One line of JSON per source: `source`, `prediction`, `references`. The file is whole or absent. Raises OSError."""
    rows = zip(sources, predictions, references, strict=True)
    lines = (json.dumps({"source": source, "prediction": text, "references": list(several)}, ensure_ascii=False) for source, text, several in rows)
    write_text(path, "".join(line + "\n" for line in lines))


def _padded(rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and their attention mask, both int64 [rows, longest]."""
    longest = max(map(len, rows))
    fill = [longest - len(row) for row in rows]
    ids = [[pad] * n + row if left else row + [pad] * n for n, row in zip(fill, rows, strict=True)]
    mask = [[0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n for n, row in zip(fill, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def _search(model: PreTrainedModel, tokenizer: Any, settings: Generation) -> Any:
    """Our settings with the special tokens of tokenizer and model, and nothing else of the model's own."""
    config, own = model.config, model.generation_config
    start = getattr(config, "decoder_start_token_id", None)
    forced = getattr(own, "forced_bos_token_id", None)
    beams = {"early_stopping": settings.early_stopping, "length_penalty": settings.length_penalty} if settings.num_beams > 1 else {}
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None) if start is None else start,
        forced_bos_token_id=None if forced == tokenizer.bos_token_id else forced,  # a language (mBART-50), not BART's plain start of a text
        **beams,
    )


class _NoRepeat(LogitsProcessor):
    """transformers' rule against repeated n-grams, for what is generated alone: it counts the source of a causal model, and its padding, too."""

    def __init__(self, size: int, begin: int) -> None:
        self.rule, self.begin = NoRepeatNGramLogitsProcessor(size), begin

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Token ids [rows, tokens] so far and scores [rows, vocabulary] -> scores, -inf where a word would repeat."""
        return self.rule(input_ids[:, self.begin :], scores)


@contextmanager
def _seeded(number: int, device: torch.device) -> Iterator[None]:
    """Draw dropout from `number` within, and leave the generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield


def _lines(text: str) -> str:
    return text if "\n" in text else re.sub(r"(?<=[.!?])\s+", "\n", text)
