"""Token-level contrastive distillation (QuantGPT: Tao et al., ACL 2022, section 4.1).

Each token's smoothed student representation q is held against the teacher's hidden state t of the same token (positive)
and against K negatives x, s the cosine similarity:

    q_i = m * bank[row of i] + (1 - m) * h_i      (h_i alone while the row is untouched)
    l_i = -log( exp(s(q_i, t_i) / tau) / (exp(s(q_i, t_i) / tau) + sum_x exp(s(q_i, x) / tau)) )

Negatives (table 4 of the paper compares them, and finds the first best) are, drawn without replacement and uniformly,

    teacher    t_j of other target positions j of the sequence
    student    q_j of other target positions j of the sequence
    random     bank rows of words that the bank has met, other than the token's own

The gradient reaches the student through h_i in q_i alone, with the factor 1 - m. A negative q_j is a constant, as t_j and the bank are:
it is there for q_i to be told apart from, and a student that could move both ends would lower the loss by spreading its words, not by
finding the teacher's. Two positions that hold the same word may be each other's negatives: their hidden states differ.

A row of the bank stands for a vocabulary id, or for a position in the sequence. By position of the corpus it would outgrow any memory
(300 GB for WikiText-103). The bank moves once per optimizer step, by the mean of each row's representations over the global batch, so that
it is equal on all ranks and does not depend on how the batch was shared out.
"""

import torch
from torch import Tensor, nn

from dqtrain.config import Contrast
from dqtrain.distill.terms import SMALLEST_NORM
from dqtrain.world import gather_tensors, sum_over_ranks


class TokenContrast(nn.Module):
    """The term and its bank. `bank` [rows, width] fp32 and `touched` [rows] are buffers, hence in every checkpoint."""

    bank: Tensor
    touched: Tensor

    def __init__(self, settings: Contrast, vocab_size: int, width: int, positions: int) -> None:
        """A bank of `vocab_size` rows or, where they stand for positions, as many as the longest sequence has: `positions`."""
        super().__init__()
        by_word = settings.bank == "vocabulary"
        assert by_word or settings.negatives_from != "random", "random negatives are words, but rows of a bank of positions are none"
        self.settings = settings
        self.register_buffer("bank", torch.zeros(vocab_size if by_word else positions, width))
        self.register_buffer("touched", torch.zeros(len(self.bank), dtype=torch.bool))
        self._seen: tuple[Tensor, Tensor] | None = None  # what this step's micro-batches on this rank bring to the bank, as `_sum_per_row` gives it

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, input_ids: Tensor, is_target: Tensor) -> Tensor:
        """Hidden states [samples, tokens, width], ids and mask [samples, tokens] -> loss of each target token [n], row-major, in nats.

        Negatives are drawn with torch's global generator, which the trainer seeds per micro-batch; where there are fewer than
        `settings.negatives`, all are used, and where there are none, as before the first step of random ones, the loss is 0.
        """
        rows = input_ids if self.settings.bank == "vocabulary" else torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        padding = ~is_target[..., None]
        student = student_hidden.to(self.bank.dtype).masked_fill(padding, 0.0)
        teacher = teacher_hidden.detach().to(self.bank.dtype).masked_fill(padding, 0.0)
        query = student.lerp(self.bank[rows], self.settings.momentum * self.touched[rows][..., None].to(student.dtype))
        if self.training:
            self._see(rows[is_target], student.detach()[is_target])
        if self.settings.negatives_from == "random":
            keys, chosen, is_real = self._words(input_ids)
        else:
            keys = teacher if self.settings.negatives_from == "teacher" else query.detach()
            chosen, is_real = self._other_tokens(is_target)
        # Products of all pairs, and then the few that count: a matrix product is cheaper than fetching K vectors per token. Norms come after it.
        products = (query @ keys.transpose(1, 2)).gather(-1, chosen)
        negative = products / _norm(keys).gather(-1, chosen.flatten(1)).view_as(products)
        positive = (query * teacher).sum(-1) / _norm(teacher)
        scores = torch.cat([positive[..., None], negative], -1) / (_norm(query) * self.settings.temperature)[..., None]
        scores = scores.masked_fill(~nn.functional.pad(is_real, (1, 0), value=True), -torch.inf)[is_target]
        return scores.logsumexp(-1) - scores[:, 0]

    def _other_tokens(self, is_target: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [samples, tokens, K] of each target token's negatives, and whether they are any.

        A sequence draws K different distances, and each of its target tokens takes those that lie so far behind it, in a circle: a uniform
        draw without replacement for every token, at the price of one per sequence (one per token took half of this term's time).
        """
        samples, tokens = is_target.shape
        count = is_target.sum(1)[:, None, None]
        draw = torch.rand(samples, 1, tokens - 1, device=is_target.device)
        distance = torch.arange(1, tokens, device=is_target.device)
        drawn, slot = draw.masked_fill(distance >= count, -1.0).topk(min(self.settings.negatives, tokens - 1), sorted=False)
        place = is_target.cumsum(1)[..., None] + slot  # of a negative among its sequence's target tokens: the token's own, and slot + 1 behind
        position = is_target.byte().argsort(dim=1, descending=True, stable=True)
        chosen = position.gather(1, (place % count.clamp(min=1)).flatten(1)).view_as(place)
        return chosen, (drawn >= 0).expand_as(chosen)

    def _words(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bank rows [samples, K + 1, width], which of them are each token's negatives [samples, tokens, K], and whether they are any.

        A sequence draws K + 1 words, so that every token has K others, whichever of them is its own.
        """
        draw = torch.rand(len(input_ids), len(self.bank), device=input_ids.device).masked_fill(~self.touched, -1.0)
        drawn, words = draw.topk(min(self.settings.negatives + 1, len(self.bank)), sorted=True)  # untouched ones last
        own = words[:, None, :] == input_ids[..., None]
        passed = own.long().cumsum(-1)[..., :-1]  # 1 from a token's own word on, which is skipped
        chosen = torch.arange(words.shape[1] - 1, device=input_ids.device) + passed
        is_real = (drawn >= 0)[:, None, :].expand_as(own).gather(-1, chosen)
        return self.bank[words], chosen, is_real

    def _see(self, rows: Tensor, hidden: Tensor) -> None:
        seen = (rows, torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1))  # the last column counts
        if self._seen is not None:
            seen = (torch.cat([self._seen[0], seen[0]]), torch.cat([self._seen[1], seen[1]]))
        self._seen = _sum_per_row(*seen)

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the bank by the global mean per row. Collective; call once per optimizer step, also on a rank that has seen nothing."""
        own_rows, own_sums = self._seen or (torch.empty(0, dtype=torch.long, device=self.bank.device), self.bank.new_empty(0, self.bank.shape[1] + 1))
        self.forget_step()
        rows = torch.cat(gather_tensors(own_rows)).unique()
        if len(rows) == 0:
            return
        # Every rank adds up the rows of all, so memory does not grow with the number of ranks, and all banks hold the same bits.
        sums = own_sums.new_zeros(len(rows), own_sums.shape[1])
        sums[torch.searchsorted(rows, own_rows)] = own_sums
        sums = sum_over_ranks(sums)
        mean = sums[:, :-1] / sums[:, -1:]
        self.bank[rows] = torch.where(self.touched[rows][:, None], mean.lerp(self.bank[rows], self.settings.momentum), mean)
        self.touched[rows] = True

    def forget_step(self) -> None:
        """What was seen since the last step counts no more."""
        self._seen = None


def _sum_per_row(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n] and values [n, width] -> each row once, ascending, and the sum of its values, always added in their order (`index_add_` on a GPU is not)."""
    rows, order = rows.sort(stable=True)
    unique, lengths = rows.unique_consecutive(return_counts=True)
    return unique, torch.segment_reduce(values[order], "sum", lengths=lengths, axis=0, unsafe=True)  # its check of the lengths fails where there are none


def _norm(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1).clamp(min=SMALLEST_NORM)
