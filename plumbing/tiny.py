"""A language model small enough to make on a CPU in a minute: its shape, and its tokenizer."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY_MODEL = {  # a Llama of 111,000 parameters
    "hidden_size": 64,
    "intermediate_size": 168,  # of the MLP
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,  # the longest chain and its solution take 117
    "initializer_range": 0.05,  # standard deviation of the first weights
    "tie_word_embeddings": False,
}


def tiny_model(tokenizer, seed):
    """A tiny Llama, randomly initialised."""
    torch.manual_seed(seed)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, **ids, **TINY_MODEL)
    return LlamaForCausalLM(config)


def word_tokenizer(words, pattern):
    """A token for each of the words into which the pattern cuts a text, <pad> and <eos> first."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()  # join without spaces: decode(encode(text)) == text
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
