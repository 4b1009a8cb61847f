"""Loading: nothing missing, nothing left over, every byte accounted for, whatever the cut into stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chained import Chained, build_decoder
from tiny import FAMILIES, HYBRID_FAMILIES, prompt_logits, random_prompts, tiny_checkpoint, without_vision
from trireme.core.refusal import Refusal
from trireme.models.cost import rank_param_bytes
from trireme.models.decoder import Decoder
from trireme.parallel.plan import Plan
from trireme.weights.load import Manifest, fill_dummy, load


def load_stage(directory: Path, cut: list[int], stage: int, **more) -> tuple[Decoder, Manifest]:
    decoder = build_decoder(directory, cut, stage, **more)
    return decoder, load(decoder, directory)


def rewrite(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRID_FAMILIES])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cut", [[5], [3, 2], [1, 2, 2]])
def test_every_byte_is_used_once(family: str, tied: bool, cut: list[int], tmp_path: Path):
    """Over all stages each tensor is read by one; a tied embedding by both ends. A tower that sees, and a head that is not wanted,
    are read by none."""
    tiny_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    manifests = [load_stage(tmp_path, cut, stage)[1] for stage in range(len(cut))]
    spec = build_decoder(tmp_path, cut, 0).build.spec
    whole = manifests[0].file_bytes
    twice = 4 * spec.vocab_size * spec.hidden if tied and len(cut) > 1 else 0
    passed = ("model.visual.", "mtp.")
    dropped = sum(tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items() if name.startswith(passed))
    assert (dropped > 0) == (family in HYBRID_FAMILIES)
    assert sum(manifest.used_bytes for manifest in manifests) == whole - dropped + twice
    for stage, manifest in enumerate(manifests):
        expected = rank_param_bytes(spec, Plan(layer_cut=tuple(cut)), stage, 0, 4)
        assert manifest.read_bytes == manifest.used_bytes == manifest.param_bytes == expected
        assert manifest.used_bytes + manifest.elsewhere_bytes == whole - dropped and manifest.dropped_bytes == dropped


def test_shards_are_one_checkpoint(tmp_path: Path):
    tiny_checkpoint(tmp_path / "one", "llama")
    tiny_checkpoint(tmp_path / "many", "llama", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    prompt = random_prompts([12])[0]
    assert torch.equal(*(Chained(tmp_path / name, [2, 3]).forward({0: prompt}) for name in ("one", "many")))


def test_a_model_inside_a_larger_one_is_the_model_alone(tmp_path: Path):
    prompt = random_prompts([12])[0]
    inside = Chained(tiny_checkpoint(tmp_path, "qwen3_5", tie_word_embeddings=True), [2, 3]).forward({0: prompt})
    assert torch.equal(Chained(without_vision(tmp_path), [2, 3]).forward({0: prompt}), inside)


def test_what_is_float32_stays_so_beside_bfloat16(tmp_path: Path):
    """Decays, and norms that have one added: 1 + 2 ** -10 would be 1 in bfloat16."""
    tiny_checkpoint(tmp_path, "qwen3_5")
    norm = "model.language_model.layers.0.input_layernorm.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({norm: torch.full((48,), 2.0**-10)}))
    decoder, _ = load_stage(tmp_path, [5], 0, dtype=torch.bfloat16)
    params = dict(decoder.params())
    wide = {name.partition(".")[2] or name for name, param in params.items() if param.dtype == torch.float32}
    wide = {name.partition(".")[2] if name[0].isdigit() else name for name in wide}
    assert wide == {"norm", "attn.norm", "attn.q_norm", "attn.k_norm", "mlp.norm", "delta.norm", "delta.log_decay", "delta.dt_bias"}
    assert bool((params["layers.0.delta.norm"] == 1 + 2.0**-10).all())


def test_dummy_norms_are_one(tmp_path: Path):
    decoder = build_decoder(tiny_checkpoint(tmp_path, "qwen3_next"), [5], 0)
    fill_dummy(decoder)
    norms = [param for name, param in decoder.params() if name.endswith("norm")]
    assert len(norms) == 5 * 2 + 2 * 2 + 3 + 1 and all(bool((norm == 1).all()) for norm in norms)


def test_a_bfloat16_checkpoint_widens(tmp_path: Path):
    tiny_checkpoint(tmp_path, "qwen3")
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    _, manifest = load_stage(tmp_path, [5], 0)
    assert manifest.param_bytes == 2 * manifest.read_bytes
    prompt = random_prompts([12])[0]
    torch.testing.assert_close(Chained(tmp_path, [5]).forward({0: prompt}), prompt_logits(tmp_path, prompt), atol=1e-4, rtol=0)


def test_progress_ends_with_all_bytes(tmp_path: Path):
    decoder = build_decoder(tiny_checkpoint(tmp_path, "llama"), [4, 1], 0)
    seen = []
    manifest = load(decoder, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.read_bytes, manifest.read_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_old_inverse_frequencies_are_passed_over(tmp_path: Path):
    tiny_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load_stage(tmp_path, [5], 0)[1].dropped_bytes == 16


def test_a_tied_checkpoints_own_head_is_passed_over_if_it_is_equal(tmp_path: Path):
    tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    prompt = random_prompts([5])[0]
    torch.testing.assert_close(Chained(tmp_path, [3, 2]).forward({0: prompt}), prompt_logits(tmp_path, prompt), atol=1e-4, rtol=0)
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(Refusal, match="has both and they differ"):
        load_stage(tmp_path, [5], 0)


@pytest.mark.parametrize(
    ("name", "refused_by"),
    [
        ("model.layers.0.self_attn.q_proj.bias", {0}),  # a block that is here, but no parameter
        ("model.layers.5.mlp.down_proj.weight", {0, 1}),  # a layer beyond the model's
        ("model.vision.weight", {0, 1}),
        ("lm_head.bias", {1}),
    ],
)
def test_left_over_tensors_are_refused(name: str, refused_by: set[int], tmp_path: Path):
    tiny_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(48)}))
    for stage in range(2):
        if stage in refused_by:
            with pytest.raises(Refusal, match=f"does not use: {name}"):
                load_stage(tmp_path, [2, 3], stage)
        else:
            load_stage(tmp_path, [2, 3], stage)
    with pytest.raises(Refusal, match=name):
        load_stage(tmp_path, [5], 0)


@pytest.mark.parametrize(
    ("name", "target", "refused_by"),
    [
        ("model.layers.3.self_attn.k_proj.weight", "layers.3.attn.qkv.weight", 1),
        ("model.embed_tokens.weight", "embed.weight", 0),
        ("model.norm.weight", "head.norm", 1),
    ],
)
def test_missing_tensors_are_refused(name: str, target: str, refused_by: int, tmp_path: Path):
    tiny_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(Refusal, match=f"not at all, or in part: {target}"):
        load_stage(tmp_path, [2, 3], refused_by)
    load_stage(tmp_path, [2, 3], 1 - refused_by)


def test_a_tied_checkpoint_without_its_embedding_is_refused_on_both_ends(tmp_path: Path):
    tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    for stage, target in enumerate(("embed.weight", "head.proj.weight")):
        with pytest.raises(Refusal, match=target):
            load_stage(tmp_path, [2, 3], stage)


def test_a_tensor_of_another_kind_of_layer_is_left_over(tmp_path: Path):
    """Layer 2 has attention: a delta layer's weights there are nobody's, on any stage."""
    tiny_checkpoint(tmp_path, "qwen3_next")
    name = "model.layers.2.linear_attn.out_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(48, 24)}))
    with pytest.raises(Refusal, match=f"does not use: {name}"):
        load_stage(tmp_path, [2, 3], 1)


def test_another_shape_is_refused(tmp_path: Path):
    tiny_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(Refusal, match=r"model.norm.weight is \[47\], but config.json makes it \[48\]"):
        load_stage(tmp_path, [5], 0)


def test_dummy_weights_do_not_know_the_cut(tmp_path: Path):
    tiny_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)

    def weights(cut: list[int]) -> dict[str, torch.Tensor]:
        found = {}
        for stage in range(len(cut)):
            decoder = build_decoder(tmp_path, cut, stage)
            params = dict(decoder.params())
            assert fill_dummy(decoder, seed=3).param_bytes == sum(param.nbytes for param in params.values())
            found |= {name: param.data for name, param in params.items()}
        return found

    one, three = weights([5]), weights([2, 1, 2])
    assert set(three) - set(one) == {"head.proj.weight"}
    assert torch.equal(three.pop("head.proj.weight"), one["embed.weight"])
    assert all(torch.equal(three[name], one[name]) for name in one)
    assert bool((one["layers.0.attn.q_norm"] == 1).all()) and one["embed.weight"].std() > 0
