"""Trains assets/demo-tokenizer.json: a small byte-level BPE with Harmony's control tokens.

Usage: python make_demo_tokenizer.py [REPOSITORY_ROOT]

The text is the repository's own (sources, documents, profiles) and the sentences below, so a later run trains on later
text and gives another vocabulary. That is harmless: nothing depends on its ids, which are read from the file. Split
regex, byte alphabet and control tokens are as in gpt-oss; the ids are not, on purpose.
"""

import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SIZE = 3072  # highest id + 1
CONTROL = [
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>",
] + [f"<|reserved_{n}|>" for n in range(7)]

# o200k's split, as gpt-oss uses it.
SPLIT = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])

# Weighted: what a chat contains most.
SENTENCES = [
    "You are a helpful assistant. Answer the user's question in a few short sentences.",
    "# Instructions\n\nUse the tools when they help. Otherwise answer from what you know.",
    "Reasoning: low\nReasoning: medium\nReasoning: high\nKnowledge cutoff: 2024-06\nCurrent date: 2026-01-31",
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "Calls to these tools must go to the commentary channel: 'functions'.",
    "system developer user assistant analysis commentary final json functions to=functions. to=assistant",
    "// Searches the corpus and returns the best passages.\ntype search_corpus = (_: {\nquery: string,\n}) => any;",
    '{"query": "who wrote the first program", "limit": 10, "exact": false, "tags": ["history", "computing"]}',
    "What is the capital of France? The capital of France is Paris. It lies on the river Seine.",
    "Hello! How can I help you today? I'd be glad to explain how that works, step by step.",
    "The user asks about the weather. We should call the tool with the city's name, then answer.",
    "Once upon a time there was a small model that lived in memory and spoke only when it was asked.",
    "Let me think about this. First, we know that two and two make four. So the answer must be four.",
    "Guten Tag! Wie geht es Ihnen? Bonjour, comment allez-vous ? Buenos días, ¿qué tal?",
    "東京は日本の首都です。今天天气很好。안녕하세요, 반갑습니다. Привет, как дела?",
    "def main():\n    for i in range(10):\n        print(i)\n\nif __name__ == \"__main__\":\n    main()\n",
]


def corpus(root):
    for path in sorted(root.rglob("*")):
        parts = set(path.relative_to(root).parts)
        if path.suffix in {".rs", ".md", ".toml", ".cu", ".cuh"} and not parts & {"target", ".git"}:
            yield path.read_text(encoding="utf-8", errors="replace")
    yield from SENTENCES * 40


def main():
    chat = Path(__file__).resolve().parents[2]
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else chat.parents[1]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(root), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    assert tokenizer.get_vocab_size() == SIZE, tokenizer.get_vocab_size()
    out = chat / "assets" / "demo-tokenizer.json"
    tokenizer.save(str(out), pretty=False)
    print(f"{out.name}: {SIZE} tokens, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
