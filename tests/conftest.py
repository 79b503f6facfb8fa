"""Backends, devices and the --slow switch, shared by every test."""

import pytest
import torch

import fastkd
from fastkd._library import usable_instruction_sets

BACKENDS = [f"cpu-{name}" for name in usable_instruction_sets()]  # best first


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what needs many gigabytes")
    parser.addoption(
        "--backends", help="comma-separated, or 'best'; default: all that this machine runs"
    )


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--backends")
        names = wanted.split(",") if wanted else BACKENDS
        if wanted == "best":
            names = BACKENDS[:1]
        metafunc.parametrize("backend", names, indirect=True)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def backend(request):
    """The implementation under test, as a device; CPU instruction sets are switched for a test."""
    chosen = fastkd.cpu_capability()
    fastkd.cpu_capability(request.param.removeprefix("cpu-"))
    yield torch.device("cpu")
    fastkd.cpu_capability(chosen)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
