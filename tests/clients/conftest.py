"""The servers of tests/e2e, for clients that need packages of their own."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))

# Nothing leaves this machine: no traces, no price lists, no lookups of versions.
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LANGSMITH_TRACING"] = "false"

from server import BINARY  # noqa: E402


def pytest_configure(config):
    import pytest

    if not pathlib.Path(BINARY).is_file():
        raise pytest.UsageError(f"{BINARY} does not exist; cargo build --release")
