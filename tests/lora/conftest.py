"""Fixtures of the tests of LoRA files."""

from tests.shared.lora_files import refusal_message, sd15_family, true_bases
from tests.shared.saved_loras import made
from tests.shared.tasks import build
