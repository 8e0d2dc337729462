"""Base models and tokenizers from folders and .gguf files."""

import pytest
import torch
from runs import assert_loaded, refused, tokenizer, train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from funcprobe.training.checkpoint import load_checkpoint


def test_a_base_that_lacks_weights_is_refused(run):
    file = run.path.parent / "base" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    refused(run.path, "every weight was expected", "model.norm.weight")


def write_gguf(gguf, module, path):
    """The module as llama.cpp stores it: other names, q and k permuted, matrices in blocks."""
    config = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"t%d" % i for i in range(61))])
    writer.add_token_scores([0.0] * 64)
    writer.add_token_types([2, 3, 3] + [1] * 61)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    packing = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in module.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n in heads.items():
            if part in name:
                tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        name, array = names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy()
        if array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, packing), raw_dtype=packing)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_base_may_be_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    base.save_pretrained(tmp_path / "base")
    write_gguf(gguf, base, tmp_path / "tiny.gguf")
    run = train(tmp_path / "checkpoint-3")
    checkpoint = load_checkpoint(run.path, base_model=tmp_path / "tiny.gguf")
    assert_loaded(checkpoint, run)
    whole = load_checkpoint(run.path)
    assert {t.dtype for t in checkpoint.base.values()} == {torch.float32}
    for name, tensor in checkpoint.base.items():
        torch.testing.assert_close(tensor, whole.base[name], rtol=0, atol=1e-3)
    skeleton = checkpoint.model.skeleton.get_base_model()
    assert not getattr(skeleton, "is_quantized", False)
    assert getattr(skeleton.config, "quantization_config", None) is None
    assert len(checkpoint.tokenizer) == 64


def test_the_tokenizer_is_the_checkpoints_else_the_bases(run, base):
    assert load_checkpoint(run.path).tokenizer is None
    tokenizer().save_pretrained(run.path.parent / "base")
    checkpoint = load_checkpoint(run.path)
    assert len(checkpoint.tokenizer) == 2 and "no tokenizer found" not in checkpoint.notes
    assert load_checkpoint(run.path, base_model=base).tokenizer is None
    added = tokenizer()
    added.add_tokens(["b"])
    added.save_pretrained(run.path)
    assert len(load_checkpoint(run.path).tokenizer) == 3
    assert len(load_checkpoint(run.path, base_model=base).tokenizer) == 3
