"""The small hybrid model that `trireme train` makes: its config, the modules that learn, its checkpoint. Data and loop are in train.py.

The trunk is transformers' own Qwen3.5-MoE, so that what is trained is what transformers computes. The head that drafts (multi-token
prediction) is no part of transformers; here it is around transformers' decoder layer, with the tensors' names of Qwen's checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm, load_balancing_loss_func

NUM_CHAINED = 2  # drafts of a row that the head learns to make one after another
# The shape of the 35B-A3B in small. Every size can be cut by four.
_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 96,
    "max_position_embeddings": 2048,
}


def small_config(vocab_size: int, end: int, **sizes: Any) -> Qwen3_5MoeTextConfig:
    """`end` is the token that ends an answer and pads; `sizes` replace those above."""
    values = {**_SIZES, "mtp_num_hidden_layers": 1, "eos_token_id": end, "pad_token_id": end, "attn_implementation": "sdpa", **sizes}
    return Qwen3_5MoeTextConfig(architectures=["Qwen3_5MoeForCausalLM"], vocab_size=vocab_size, **values)


class DraftHead(nn.Module):
    """Guesses the token after next from a row of the trunk and the next token. Attributes are named as in checkpoints (mtp.*)."""

    def __init__(self, config: Qwen3_5MoeTextConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        one_layer = Qwen3_5MoeTextConfig.from_dict({**config.to_dict(), "num_hidden_layers": 1, "layer_types": ["full_attention"]})
        one_layer._attn_implementation, one_layer._experts_implementation = config._attn_implementation, config._experts_implementation
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(hidden, eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(one_layer, 0)])
        self.norm = Qwen3_5MoeRMSNorm(hidden, eps)

    def forward(self, embedded: Tensor, rows: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """[B, L, H]: `embedded` are the tokens after those of `rows`, which are normed; so is what comes out."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(rows)], dim=-1))
        for layer in self.layers:
            x = layer(x, position_embeddings=positions, attention_mask=None)
        return self.norm(x)


class Losses(NamedTuple):
    """Means over weighted tokens, in nats; balance is 1 where every expert gets equally much, num_experts where one gets all."""

    trunk: Tensor
    drafts: Tensor  # [NUM_CHAINED]
    balance: Tensor

    @property
    def total(self) -> Tensor:
        return self.trunk + 0.3 * self.drafts.mean() + 0.02 * self.balance


class Learner(nn.Module):
    """Trunk and head with their losses."""

    def __init__(self, config: Qwen3_5MoeTextConfig):
        super().__init__()
        self.trunk = Qwen3_5MoeForCausalLM(config)
        self.mtp = DraftHead(self.trunk.config)
        for module in self.mtp.modules():
            self.trunk._init_weights(module)

    def forward(self, tokens: Tensor, weights: Tensor) -> Losses:
        """tokens [B, L], padded on the right; weights [B, L] of each token's loss, 0 for padding."""
        model, config = self.trunk.model, self.trunk.config
        # no attention mask: padding comes last, where nothing before it sees it
        output = model(input_ids=tokens, use_cache=False, output_router_logits=True)
        rows = output.last_hidden_state
        num_chosen = config.num_experts_per_tok
        balance = load_balancing_loss_func(output.router_logits, config.num_experts, num_chosen, weights > 0) / num_chosen
        trunk = self._loss(rows[:, :-1], tokens[:, 1:], weights[:, 1:])

        positions = model.rotary_emb(rows, torch.arange(tokens.shape[1] - 2, device=tokens.device)[None, None].expand(3, 1, -1))
        embedded, rows, drafts = model.embed_tokens(tokens[:, 1:-1]), rows[:, :-2], []
        for _ in range(NUM_CHAINED):
            drafted = self.mtp(embedded, rows, positions)
            drafts.append(self._loss(drafted, tokens[:, 2:], weights[:, 2:]))
            # the next draft of a chain takes the head's own row in place of the trunk's, one position on
            rows = torch.cat([rows[:, :1], drafted[:, :-1]], dim=1)
        return Losses(trunk, torch.stack(drafts), torch.as_tensor(balance))

    def _loss(self, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        logits = self.trunk.lm_head(rows).float()
        each = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()


def write_model(learner: Learner, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """config.json, generation_config.json and model.safetensors with the head's tensors beside the trunk's."""
    directory.mkdir(parents=True, exist_ok=True)
    config = learner.trunk.config
    config.dtype = dtype
    config.save_pretrained(directory)
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(directory)
    tensors = {**learner.trunk.state_dict(), **{f"mtp.{name}": tensor for name, tensor in learner.mtp.state_dict().items()}}
    whole = {name: tensor.to(dtype).contiguous().cpu() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
