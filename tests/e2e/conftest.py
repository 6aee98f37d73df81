"""Servers shared by the tests of a run."""

import pathlib

import pytest

from server import BINARY, ROOT, Server

GOLDEN = ROOT / "tests" / "golden" / "served"
MLX = ROOT / "tests" / "golden" / "mlx"
QWEN = ROOT / "tests" / "golden" / "qwen3_served"
QWEN_TOKENIZER = ROOT / "crates" / "chat" / "tests" / "data" / "qwen" / "tokenizer.json"
DEMO_TOKENIZER = ROOT / "crates" / "chat" / "assets" / "demo-tokenizer.json"


def pytest_configure(config):
    if not pathlib.Path(BINARY).is_file():
        raise pytest.UsageError(f"{BINARY} does not exist; cargo build --release")


@pytest.fixture(scope="session")
def demo():
    with Server("--model", "demo") as server:
        yield server


@pytest.fixture(scope="session")
def golden():
    with Server(GOLDEN, "--tokenizer", DEMO_TOKENIZER, "--served-model-name", "golden") as server:
        yield server


@pytest.fixture(scope="session")
def mlx():
    with Server(MLX, "--tokenizer", DEMO_TOKENIZER, "--served-model-name", "golden") as server:
        yield server


@pytest.fixture(scope="session")
def qwen():
    with Server(QWEN, "--tokenizer", QWEN_TOKENIZER, "--served-model-name", "golden") as server:
        yield server
