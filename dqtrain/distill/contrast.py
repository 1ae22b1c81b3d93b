"""Token-level contrastive distillation (QuantGPT: Tao et al., ACL 2022, section 4.1).

Each token's smoothed student representation q is held against the teacher's last hidden state of the same token
(positive) and of K other tokens of the same sequence (negatives), s the cosine similarity:

    q_i = m * bank[v_i] + (1 - m) * h_i           (the bank's row of vocabulary id v_i; h_i alone on first touch)
    l_i = -log( exp(s(q_i, t_i) / tau) / sum_{j in {i} + negatives} exp(s(q_i, t_j) / tau) )

The bank is keyed by vocabulary id: by position of the corpus it would outgrow any memory (300 GB for WikiText-103). It
moves once per optimizer step, by the mean of each id's representations over the global batch, so that it is equal on
all ranks and does not depend on how the batch was shared out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqtrain.config import Contrast
from dqtrain.world import gather_tensors


class TokenContrast(nn.Module):
    """The term and its bank. `bank` [vocabulary, width] fp32 and `touched` [vocabulary] are buffers, hence in every checkpoint."""

    bank: Tensor
    touched: Tensor

    def __init__(self, settings: Contrast, vocab_size: int, width: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("bank", torch.zeros(vocab_size, width))
        self.register_buffer("touched", torch.zeros(vocab_size, dtype=torch.bool))
        self._seen: list[tuple[Tensor, Tensor]] = []  # (ids, representations) of this step's micro-batches on this rank

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, input_ids: Tensor, is_target: Tensor) -> Tensor:
        """Hidden states [samples, tokens, width], ids and mask [samples, tokens] -> loss of each target token [n], in nats.

        Negatives are drawn without replacement from the sequence's other target positions, with torch's global generator, which the trainer seeds
        per micro-batch; a sequence with fewer of them uses all.
        """
        momentum, count = self.settings.momentum, min(self.settings.negatives, input_ids.shape[1] - 1)
        old = self.bank[input_ids]
        query = torch.where(self.touched[input_ids][..., None], momentum * old + (1 - momentum) * student_hidden, student_hidden)
        similarity = functional.normalize(query, dim=-1) @ functional.normalize(teacher_hidden, dim=-1).transpose(1, 2)  # [samples, tokens, tokens]
        similarity = similarity / self.settings.temperature
        positive = similarity.diagonal(dim1=1, dim2=2)
        draw = torch.rand_like(similarity.detach())
        draw.masked_fill_(~is_target[:, None, :], -1.0).diagonal(dim1=1, dim2=2).fill_(-1.0)
        draw, chosen = draw.topk(count, dim=-1)
        negative = similarity.gather(-1, chosen).masked_fill(draw < 0, -torch.inf)
        if self.training:
            self._seen.append((input_ids[is_target], student_hidden[is_target].detach()))
        loss = torch.logsumexp(torch.cat([positive[..., None], negative], -1), -1) - positive
        return loss[is_target]

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the bank by the global mean per vocabulary id. Collective; call once per optimizer step."""
        ids = torch.cat([ids for ids, _ in self._seen])
        hidden = torch.cat([hidden for _, hidden in self._seen])
        self._seen.clear()
        unique, slot = ids.unique(return_inverse=True)
        sums = hidden.new_zeros(len(unique), hidden.shape[1] + 1)  # the last column counts
        sums[:, :-1].index_add_(0, slot, hidden)
        sums[:, -1].index_add_(0, slot, torch.ones_like(slot, dtype=sums.dtype))
        # Summed in rank order on every rank, so that all banks hold the same bits.
        all_ids, all_sums = gather_tensors(unique), gather_tensors(sums)
        keys, slot = torch.cat(all_ids).unique(return_inverse=True)
        total = sums.new_zeros(len(keys), sums.shape[1]).index_add_(0, slot, torch.cat(all_sums))
        mean = total[:, :-1] / total[:, -1:]
        momentum = self.settings.momentum
        self.bank[keys] = torch.where(self.touched[keys][:, None], momentum * self.bank[keys] + (1 - momentum) * mean, mean)
        self.touched[keys] = True
