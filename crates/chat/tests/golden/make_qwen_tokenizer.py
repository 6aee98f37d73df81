"""Trains tests/data/qwen/tokenizer.json: a small tokenizer of the structure of Qwen2 and Qwen3's.

Usage: python make_qwen_tokenizer.py      (needs tokenizers and transformers)

Normaliser, split regex, byte alphabet and the names, order and flags of the added tokens are Qwen's; vocabulary and
merges are learnt from the sentences below, so the file is small and its ids are its own. The pipeline is checked
against the one that transformers builds for a Qwen2 vocabulary.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen2Tokenizer

VOCAB = 640  # ordinary tokens: 256 bytes and what is merged of them

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]
# Added, but not special: they stay in decoded text.
VISIBLE = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]

SENTENCES = [
    "You are a helpful assistant that explores a code repository and cites the lines it read.",
    "# Tools\n\nYou may call one or more functions to assist with the user query.",
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n</tools>",
    '{"type": "function", "function": {"name": "Grep", "description": "Searches file contents.", "parameters": {}}}',
    '{"name": "Read", "arguments": {"path": "/repo/src/main.rs", "offset": 10, "limit": 200}}',
    '{"type": "object", "properties": {"pattern": {"type": "string"}}, "required": ["pattern"]}',
    "system user assistant tool\n\nWhere is the request parsed, and which function handles its errors?",
    "<final_answer>\n/repo/src/lib.rs:10-25 (the parser)\n/repo/src/error.rs:3\n</final_answer>",
    "fn main() {\n    let value = read(&path)?;\n    for line in value.lines() {\n        println!(\"{line}\");\n    }\n}\n",
    "def find(root):\n\treturn [p for p in root.rglob('*.py') if p.is_file()]\n",
    "The model's answers aren't long; it'll stop when it's done. We've seen 2024 and 1337.",
    "東京は日本の首都です。今天天气很好。안녕하세요. Привет, как дела? Größe, café, naïve.",
]


def main():
    out = Path(__file__).resolve().parents[1] / "data" / "qwen" / "tokenizer.json"
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    added = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    tokenizer.add_special_tokens(added)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in VISIBLE])
    assert tokenizer.get_vocab_size() == VOCAB + len(SPECIAL) + len(VISIBLE), tokenizer.get_vocab_size()
    assert tokenizer.token_to_id("<|endoftext|>") == VOCAB
    tokenizer.save(str(out), pretty=False)

    model = json.loads(out.read_text(encoding="utf-8"))["model"]
    reference = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    for sentence in SENTENCES + ["e\u0301 \u1100\u1161\u11a8 A\u030a", "  \n\n \t x", "12345 ½ ²"]:
        ours = tokenizer.encode(sentence, add_special_tokens=False).ids
        assert ours == reference.encode(sentence, add_special_tokens=False), sentence
    print(f"{out.name}: {tokenizer.get_vocab_size()} tokens, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
