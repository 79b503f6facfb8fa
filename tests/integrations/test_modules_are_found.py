"""`fastkd.integrations.trl` and the others need no import of their own."""

import subprocess
import sys

import pytest

import fastkd


def test_a_module_is_imported_at_its_first_use():
    code = (
        "import sys, fastkd; assert 'fastkd.integrations.vllm' not in sys.modules;"
        "print(fastkd.integrations.vllm.teacher_topk.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "teacher_topk\n", done.stderr[-2000:]


def test_what_is_not_there_is_said():
    with pytest.raises(AttributeError, match=r"'fastkd.integrations' has no attribute 'ray'"):
        fastkd.integrations.ray  # noqa: B018
    assert {"trl", "verl", "vllm", "sglang", "transformers"} <= set(dir(fastkd.integrations))
