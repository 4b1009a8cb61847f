"""What a checkpoint's head drafts, by transformers' own layers: the oracle of tests of drafts. transformers itself drops the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tiny import oracle


class DraftOracle:
    """The checkpoint's decoder in transformers, and its head (mtp.*) put together of the same modules."""

    def __init__(self, directory: Path):
        self._model = oracle(directory)
        text, tensors = self._model.model, load_file(directory / "model.safetensors")
        config, head = text.config, {name.removeprefix("mtp."): tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
        self._layer = type(text.layers[-1])(config, config.num_hidden_layers - 1).eval()
        self._layer.load_state_dict(_stacked({name.removeprefix("layers.0."): head[name] for name in head if name.startswith("layers.0.")}))
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        self._token_norm, self._row_norm, self._norm = (_norm(text.norm, head[f"{name}.weight"], config.rms_norm_eps) for name in norms)
        self._fc, self._text = head["fc.weight"], text

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """float32 [len(tokens) - 1, V]: row i says what follows tokens[i + 1]."""
        rows = self._decoder_rows(tokens[:-1])
        return self._model.lm_head(self._head_rows(rows, tokens[1:]))

    @torch.inference_mode()
    def drafts(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        """Greedy, after a text whose last token was just sampled."""
        rows, nexts = self._decoder_rows(tokens[:-1]), list(tokens[1:])
        while True:
            passed = self._head_rows(rows, nexts)[-1:]
            nexts.append(int(self._model.lm_head(passed).argmax()))
            if len(nexts) == len(tokens) - 1 + num_drafts:
                return nexts[-num_drafts:]
            rows = torch.cat((rows, passed))

    def _decoder_rows(self, tokens: Sequence[int]) -> torch.Tensor:
        """After its last norm, [len(tokens), H]."""
        return self._text(torch.tensor([list(tokens)])).last_hidden_state[0]

    def _head_rows(self, rows: torch.Tensor, nexts: Sequence[int]) -> torch.Tensor:
        """[n, H] and the token after each -> [n, H]"""
        embedded = self._text.embed_tokens(torch.tensor(list(nexts)))
        x = torch.cat((self._token_norm(embedded), self._row_norm(rows)), dim=-1) @ self._fc.T
        num_rows = len(rows)
        places = torch.arange(num_rows)[None]
        mask = torch.full((1, 1, num_rows, num_rows), -torch.inf).triu(1)
        x = self._layer(x[None], position_embeddings=self._text.rotary_emb(x[None], places), attention_mask=mask)
        return self._norm(x[0])


def _norm(like: nn.Module, weight: torch.Tensor, eps: float) -> nn.Module:
    norm = type(like)(len(weight), eps=eps)
    norm.load_state_dict({"weight": weight})
    return norm


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as transformers holds them, whether a checkpoint has a tensor for each or one for all."""
    experts = [name for name in tensors if name.startswith("mlp.experts.") and name.endswith(".gate_proj.weight")]
    if not experts:
        return tensors
    parts = {
        part: torch.stack([tensors[f"mlp.experts.{expert}.{part}_proj.weight"] for expert in range(len(experts))])
        for part in ("gate", "up", "down")
    }
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("mlp.experts.")}
    return rest | {
        "mlp.experts.gate_up_proj": torch.cat((parts["gate"], parts["up"]), dim=1),
        "mlp.experts.down_proj": parts["down"],
    }


def draft_well(directory: Path, *, sureness: float = 1.0, seed: int = 0) -> Path:
    """Rewrites a tiny checkpoint so that its head is often right: each token's embedding points to the next one of a random cycle,
    which the head reads off, and the decoder says, too, where its layers do not drown it. Surer is more often right."""
    path, noise = directory / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    [embed] = [name for name in tensors if name.endswith("embed_tokens.weight")]
    vocab_size, hidden = tensors[embed].shape
    points = torch.randn(vocab_size, hidden, generator=noise)
    cycle = torch.randperm(vocab_size, generator=noise)
    tensors[embed] = sureness * points
    tensors["lm_head.weight"] = torch.empty_like(points).index_copy_(0, cycle, 0.5 * points[cycle.roll(1)])
    tensors["mtp.fc.weight"] = torch.cat((4 * torch.eye(hidden), 0.1 * torch.randn(hidden, hidden, generator=noise)), dim=1)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory
