"""The head that drafts against transformers' modules, float32, under plans: ranks in threads, no runner. Chains of drafts are
tests/ranks/test_drafter's, whole answers tests/plans/test_mtp's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chained import Chained, build_decoder
from drafted import DraftOracle
from threads import on_every_rank
from tiny import HYBRID_FAMILIES, fuse_experts, random_prompts, tiny_checkpoint
from trireme.core.refusal import Refusal
from trireme.core.step import Regime
from trireme.models.cost import rank_param_bytes
from trireme.models.schedule import schedule_of
from trireme.models.spec import read_spec
from trireme.parallel.plan import Plan
from trireme.weights.load import fill_dummy, load

SIZES = {"num_attention_heads": 12, "num_key_value_heads": 2, "num_hidden_layers": 4, "moe_intermediate_size": 24}
PLANS = {
    "one": (Plan(layer_cut=(4,), mtp=1), Regime()),
    "pp2": (Plan(layer_cut=(3, 1), mtp=1), Regime()),
    "tp2": (Plan(layer_cut=(4,), tp=2, mtp=1), Regime()),
    "pp2 tp2 sp": (Plan(layer_cut=(2, 2), tp=2, sp=True, mtp=1), Regime(sp=True)),
    "pp2 cp2": (Plan(layer_cut=(2, 2), cp=2, mtp=1), Regime(cp=True)),
    "tp2 cp2 sp": (Plan(layer_cut=(4,), tp=2, cp=2, sp=True, mtp=1), Regime(sp=True, cp=True)),
}
FOR_EXPERTS = {
    "tp2 ep2": (Plan(layer_cut=(4,), tp=2, ep=2, mtp=1), Regime()),
    "pp2 tp2 ep2 sp": (Plan(layer_cut=(2, 2), tp=2, ep=2, sp=True, mtp=1), Regime(sp=True)),
    "pp2 tp2 ep2 dispatched": (Plan(layer_cut=(2, 2), tp=2, ep=2, experts="dispatched", mtp=1), Regime()),
    "cp2 moe_dp2": (Plan(layer_cut=(4,), cp=2, moe_dp=2, mtp=1), Regime(cp=True)),
    "cp2 ep2": (Plan(layer_cut=(4,), cp=2, ep=2, mtp=1), Regime(cp=True)),
}
CASES = [(family, plan) for family in HYBRID_FAMILIES for plan in (*PLANS, *(FOR_EXPERTS if family != "qwen3_5" else ()))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_checkpoint(root / family, family, **SIZES) for family in HYBRID_FAMILIES}


def head_logits(chained: Chained, nexts: list[int]) -> torch.Tensor:
    """float32 [rows, V] of the step that was passed last, each row with its next token."""
    last, tokens = chained.plan.pp - 1, torch.tensor(nexts)

    @torch.inference_mode()
    def run(rank: int) -> torch.Tensor:
        (batch, deal, computed), head = chained.passed[last, rank], chained.decoders[last][rank].mtp
        assert head is not None and computed.normed is not None
        passed = head(computed.normed, replace(batch, tokens=tokens[torch.from_numpy(deal.own(rank))]), deal)
        assert passed.shape == computed.normed.shape
        return head.logits(passed)

    logits = on_every_rank(chained.plan.ranks, run, chained.boards[last])
    assert all(torch.equal(logits[rank], logits[rank % chained.plan.tp]) for rank in range(chained.plan.ranks))
    return torch.cat(logits[: chained.plan.tp], dim=1)


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_logits_of_the_head_are_transformers(checkpoints, family, plan):
    """Two prompts in two chunks each, under any plan; of the first chunk only keys and values are kept."""
    plan, regime = (PLANS | FOR_EXPERTS)[plan]
    prompts, oracle = random_prompts([41, 27]), DraftOracle(checkpoints[family])
    chained, found = Chained(checkpoints[family], plan), []
    for begin, end in ((0, 16), (16, 26)):
        new = {number: prompt[begin : end if begin == 0 else -1] for number, prompt in enumerate(prompts)}
        chained.forward(new, regime=regime, head_rows=[0, 3][:begin])  # the head that drafts reads all rows, whatever is asked
        nexts = [token for prompt, part in zip(prompts, new.values(), strict=True) for token in prompt[begin + 1 : begin + 1 + len(part)]]
        found.append(head_logits(chained, nexts).split([len(part) for part in new.values()]))
    for number, prompt in enumerate(prompts):
        logits = torch.cat([chunk[number] for chunk in found])
        torch.testing.assert_close(logits, oracle.logits(prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_rows_that_draft_nothing_leave_the_same_keys_and_values(checkpoints, family):
    [prompt] = random_prompts([40])
    chained = Chained(checkpoints[family], Plan(layer_cut=(4,), mtp=1))
    chained.forward({0: prompt[:-1]})
    (batch, deal, computed), head = chained.passed[0, 0], chained.decoders[0][0].mtp
    assert head is not None and computed.normed is not None
    batch = replace(batch, tokens=torch.tensor(prompt[1:]))
    with torch.inference_mode():
        head(computed.normed, batch, deal)
        pools = [pool.clone() for pool in batch.caches[head.attention.cache]]
        for pool in batch.caches[head.attention.cache]:
            pool.zero_()
        head.keep(computed.normed, replace(batch, attention={}), deal)
    assert all(torch.equal(pool, again) for pool, again in zip(pools, batch.caches[head.attention.cache], strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_every_tensor_of_the_head_is_read_once_and_the_embedding_where_it_is_needed(tmp_path, family, tied):
    """The embedding is read again by a last stage that has none, unless it has it as its projection already. Without a head to
    use, its tensors are passed over by name."""
    checkpoint = tiny_checkpoint(tmp_path, family, tie_word_embeddings=tied, num_hidden_layers=4)
    tensors = load_file(checkpoint / "model.safetensors")
    [embedding] = [tensor.nbytes for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    head = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("mtp."))
    read = {}
    for cut in ((4,), (2, 2)):
        for mtp in (0, 2):
            decoders = [build_decoder(checkpoint, Plan(layer_cut=cut, mtp=mtp), stage) for stage in range(len(cut))]
            manifests = [load(decoder, checkpoint) for decoder in decoders]
            read[len(cut), mtp] = sum(manifest.read_bytes for manifest in manifests)
            passed_over = manifests[0].dropped_bytes - sum(tensor.nbytes for name, tensor in tensors.items() if "visual" in name)
            assert passed_over == (0 if mtp else head)
    assert read[1, 2] - read[1, 0] == head
    assert read[2, 2] - read[2, 0] == head + (0 if tied else embedding)
    assert read[2, 0] - read[1, 0] == (embedding if tied else 0)


def test_a_head_with_experts_in_one_tensor_is_the_same(checkpoints, tmp_path):
    [prompt], plan = random_prompts([20]), Plan(layer_cut=(4,), mtp=1)
    fused = fuse_experts(Path(shutil.copytree(checkpoints["qwen3_next"], tmp_path / "fused")))
    found = []
    for folder in (checkpoints["qwen3_next"], fused):
        chained = Chained(folder, plan)
        chained.forward({0: prompt[:-1]})
        found.append(head_logits(chained, prompt[1:]))
    assert torch.equal(*found)


def test_the_head_has_experts_where_the_last_layer_has(tmp_path):
    """Bytes are those that the cost model says, also where layers before it have experts."""
    checkpoint, plan = tiny_checkpoint(tmp_path, "qwen3_next", num_hidden_layers=4, mlp_only_layers=[3]), Plan(layer_cut=(4,), mtp=1)
    assert load(build_decoder(checkpoint, plan, 0), checkpoint).param_bytes == rank_param_bytes(read_spec(checkpoint), plan, 0, 0, 4)


def test_dummy_heads_embed_as_the_model_does(checkpoints):
    """Also on a stage that has the embedding for the head alone: how many drafts stand must not depend on the cut."""
    decoders = [build_decoder(checkpoints["qwen3_5"], PLANS["pp2"][0], stage) for stage in (0, 1)]
    for decoder in decoders:
        fill_dummy(decoder)
    first, last = (dict(decoder.params()) for decoder in decoders)
    assert torch.equal(first["embed.weight"], last["mtp.embed.weight"])


def test_a_tensor_that_the_head_does_not_know_is_refused(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["qwen3_5"], tmp_path / "more"))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "mtp.shared_head.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"mtp\.shared_head"):
        load(build_decoder(folder, Plan(layer_cut=(4,), mtp=1), 0), folder)


def test_a_head_of_several_layers_is_refused(checkpoints):
    spec, plan = replace(read_spec(checkpoints["qwen3_5"]), num_mtp_layers=2), Plan(layer_cut=(4,), mtp=1)
    with pytest.raises(Refusal, match="2 layers"):
        schedule_of(spec, plan, 0)


def test_its_collectives_are_scheduled(checkpoints):
    """As any layer's: its rows come in, attention and MLP owe sums, and the rows that it gives are whole everywhere."""
    lines = schedule_of(read_spec(checkpoints["qwen3_5"]), PLANS["pp2 tp2 sp"][0], 1)
    assert [line.split(maxsplit=1) for line in lines if line.startswith("  mtp")] == [
        *[["mtp.enter", "all_reduce tp"], ["mtp.layers.0.mlp", "all_reduce tp"], ["mtp.out", "all_reduce tp"]],
        ["mtp.enter", "reduce_scatter tp"],
        ["mtp.layers.0.attn", "all_gather tp"],
        ["mtp.layers.0.mlp", "reduce_scatter tp, all_gather tp"],
        ["mtp.out", "reduce_scatter tp, all_gather tp"],
    ]
