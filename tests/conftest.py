"""Fixtures that every test may ask for; they are written in tests/shared/."""

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.shared.families import pipes
from tests.shared.feature_networks import nets
from tests.shared.image_sets import (
    bars,
    blobs,
    captioned_photos,
    other_photos,
    parts,
    photos,
    shapes,
)
from tests.shared.local_hub import local_hub
from tests.shared.runs import settings
from tests.shared.tiny_pipelines import base, bases
from trainers.atomic import CACHE_VARIABLE

torch.set_num_threads(1)
# a shell's & has it ignored, and what the tests start would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """`Family.unload` collects garbage; without what the imports left, that takes no time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Plans are kept from one test to the next, and not from one run of the tests to another."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
