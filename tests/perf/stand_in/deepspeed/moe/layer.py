"""What the benchmarks use of DeepSpeed's MoE: its arguments, its parts, what it computes and returns; written for these tests."""

import torch
from torch import nn


class MoE(nn.Module):
    def __init__(self, hidden_size, expert, num_experts, k, drop_tokens, use_rts, top2_2nd_expert_sampling, min_capacity):
        super().__init__()
        assert {drop_tokens, use_rts, top2_2nd_expert_sampling, min_capacity} == {False}
        self.k, self.deepspeed_moe = k, nn.Module()
        self.deepspeed_moe.gate = nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(expert for _ in range(num_experts))

    def forward(self, x_BSD):
        x_TD, experts = x_BSD.flatten(0, -2), self.deepspeed_moe.experts.deepspeed_experts
        with torch.autocast(x_TD.device.type, enabled=False):
            probs_TE = self.deepspeed_moe.gate.wg(x_TD.float()).softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(-1, probs_TE.topk(self.k).indices, 1.0)
        weights_TE = probs_TE * chosen_TE / (probs_TE * chosen_TE).sum(dim=-1, keepdim=True)
        y_TD = sum(weights_TE[:, index, None] * expert(x_TD) for index, expert in enumerate(experts)).to(x_TD.dtype)
        first_TE = torch.zeros_like(probs_TE).scatter(-1, probs_TE.topk(1).indices, 1.0)
        loss = len(experts) * (first_TE.mean(dim=0) * probs_TE.mean(dim=0)).sum()
        return y_TD.view_as(x_BSD), loss, chosen_TE.sum(dim=0)
