"""The generator of REQUIREMENTS.md: what it takes for a test, and what it calls a mistake."""

import sys

from server import ROOT

sys.path.insert(0, str(ROOT / "tests"))

import requirements  # noqa: E402

RUST = """
/// HAR-01: not a test.
fn helper() {}

/// OAI-01, OAI-02.
#[tokio::test(flavor = "multi_thread")]
async fn streamed() {}

// HAR-02 stands too far away.

#[test]
fn far() {}

proptest! {
    /// RSP-09:
    /// on two lines, KRN-01 on the second.
    #[test]
    fn inner(x in 0..3) {}
}

#[test]
fn her_03_by_its_name() {}
"""

PYTHON = '''
"""OPS-01."""

def helper():
    """HAR-01."""

class Group:
    def test_inside(self):
        """HAR-02 and
        HAR-03."""

def test_plain():
    pass
'''


def named(tests):
    return {name: requirements.ids(comment, name) for name, comment in tests}


def test_who_holds_what():
    assert named(requirements.rust_tests(RUST)) == {
        "streamed": ["OAI-01", "OAI-02"],
        "far": [],
        "inner": ["KRN-01", "RSP-09"],
        "her_03_by_its_name": ["HER-03"],
    }
    assert named(requirements.python_tests(PYTHON)) == {"test_inside": ["HAR-02", "HAR-03"], "test_plain": []}
    assert named(requirements.python_tests(PYTHON, script=True))[""] == ["OPS-01"]


def test_mistakes_are_named():
    holders = {"HAR-01": [("a.rs", "t")], "OAI-77": [("b.rs", "u")]}
    table = {
        "HAR-01": {"text": "x", "open": "why"},
        "HAR-02": {"text": "x"},
        "HAR-03": {"text": "x", "except": "half"},
        "HAR-04": {"open": "no text"},
        "HAR-05": {"text": "x", "open": "why"},
    }
    found = requirements.mistakes(table, holders)
    for name in ("HAR-01", "HAR-02", "HAR-03", "HAR-04", "OAI-77"):
        assert any(what.startswith(name) for what in found), (name, found)
    assert not any(what.startswith("HAR-05") for what in found)
    text = requirements.page({"HAR-01": {"text": "It works.", "except": "at night"}}, holders)
    assert "1 lines: 0 held, 1 held in part, 0 not held." in text and "`a.rs`: `t`" in text and "at night" in text
