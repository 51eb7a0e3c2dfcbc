"""Configs that are broken at random: each is read, or refused in a message, within seconds.

python tests/fuzz_config.py [--cases 2000] [--seed 0]

Exit status 1 and the case for a traceback, a hang, a value that was taken although it lies outside
of the schema's limits, or a config that does not read back equal.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.shared.schema_limits import outside
from trainers.config import KINDS, Config, loading
from trainers.errors import UserError

SECONDS_PER_CASE = 20  # a case takes milliseconds, or one time limit of a slow regex
MAX_LINE = 1500

# separated by two spaces
PLAIN_VALUES = """
null  ~  true  false  yes  no  on  off  0  1  -1  0.5  1e-4  1e300  -1e300  1e-320  1e999  .inf
-.inf  .nan  1e5  010  0x10  0o7  1:30  1_000  2024-01-01  2024-13-45  2**63  9223372036854775808
-9223372036854775809  []  {}  [[]]  [1, 2]  [0.9, 0.999]  [0.9, .nan]  {a: 1}  {1: a}  ''  ' '
'0'  '1e5'  !!timestamp foo  !!python/name:os.system  !!binary aGk=  !!str 5  !!set {a}  *a  &a
&a [*a]  <<: *a  a: b: c  'unclosed  "unclosed  [  ]  {  }  -  ?  |  >  @  `  %  #  &  !  ,  :
latest  none  auto  selective  prodigy  adafactor  nf4  fp8  flux  sd3  sd15  gan  unet  /no/such
~/x  ~nobody/x  .  ..  /  C:\\x  https://x/y  x.safetensors  (a  a{99999999999}  (.+)+$
((a{1000}){1000})  (?R)  [a-z  .*to_q  \\u0000  é  漢字  \U0001f600
"""
VALUES = [value for line in PLAIN_VALUES.splitlines() for value in line.split("  ") if value]
BUILT_VALUES = (
    "1" * 5000,
    "9" * 400,
    "[" * 3000,
    "{a: " * 500,
    "'" + "a" * 20_000 + "'",
    '"\\0"',
    '"\\ud800"',
    "[" + "a, " * 3000 + "a]",
    "\x00",
    "\ud800",
    "\t1",
    "1\n\t2",
)
PIECES = ("\t", " ", "\n", ":", ": ", "- ", "[", "]", "{", "}", "'", '"', "#", "&a ", "*a", "\0")
PIECES += ("!!x ", "|", ">", "---\n", "...\n", "%YAML 9.9\n", "\x85", "\u2028", "\ufeff", "<<: ")
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11)
)


class HangError(BaseException):
    """A case took longer than `SECONDS_PER_CASE`; no handler of the toolkit may swallow it."""


@dataclass
class Case:
    """The bytes of a config file, and the overrides on the command line."""

    content: bytes
    overrides: list[str]


def valid_texts(folder: Path) -> list[str]:
    """A config of each kind that loads, with all of its keys."""
    source = {"data": {"instance_data_dir": str(folder), "image_dir": str(folder)}}
    texts = []
    for kind in KINDS:
        key = "instance_data_dir" if kind == "dreambooth" else "image_dir"
        tree: dict[str, Any] = {"kind": kind, "output_dir": str(folder / "run")}
        tree |= {"data": {key: source["data"][key]}, "tracking": {"report_to": []}}
        if kind == "gan":
            tree |= {"train": {"train_batch_size": 4}}
            tree["data"]["resolution"] = 32
        if kind == "unet":
            tree["use"] = "colorize"
            tree["data"]["channels"] = 3
        config, mistakes = loading.validate(tree)
        if mistakes:
            raise AssertionError(mistakes)
        texts.append(loading.dump_config(config))
    return texts


def random_value(rng: random.Random) -> str:
    kind = rng.randrange(7)
    if kind == 0:
        return str(rng.choice((-1, 1)) * 10 ** rng.randrange(25))
    if kind == 1:
        return repr(rng.uniform(-1, 1) * 10.0 ** rng.randrange(-300, 300))
    if kind == 2:
        return rng.choice(BUILT_VALUES)
    if kind in (3, 4):
        return str(rng.choice((0.5, 0.9, 1, 2, 4, 8, 16, 32, 64, 100, 256, 1e-5)))
    return rng.choice(VALUES)


def mutate_value(text: str, rng: random.Random) -> str:
    """Another value for a key."""
    lines = text.split("\n")
    numbers = [number for number, line in enumerate(lines) if ":" in line]
    number = rng.choice(numbers)
    lines[number] = f"{lines[number].partition(':')[0]}: {random_value(rng)}"
    return "\n".join(lines)


def mutate_lines(text: str, rng: random.Random) -> str:
    """A line twice, gone, elsewhere, indented otherwise, or cut off."""
    lines = text.split("\n")
    number = rng.randrange(len(lines))
    line = lines[number]
    lines[number : number + 1] = rng.choice(
        (
            [line, line],
            [],
            [" " * rng.randrange(9) + line.strip()],
            ["\t" + line],
            [line[: len(line) // 2]],
            [line, rng.choice(lines)],
            [line, BOMB],
        )
    )
    return "\n".join(lines)


def mutate_text(text: str, rng: random.Random) -> str:
    """Some of YAML's own signs, anywhere."""
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(PIECES) * rng.randrange(1, 4) + text[place:]
    return text


# other values are the most promising
MUTATIONS = (mutate_value, mutate_value, mutate_value, mutate_lines, mutate_text)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Other bytes, another encoding, or the first part alone."""
    kind = rng.randrange(4)
    if kind == 0:
        return content.decode("utf-8", "replace").encode(
            rng.choice(("utf-16", "utf-32", "cp037")), "replace"
        )
    if kind == 1:
        return content[: rng.randrange(len(content) + 1)]
    changed = bytearray(content or b"x")
    for _ in range(rng.randrange(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def random_override(text: str, rng: random.Random) -> str:
    tree = yaml.safe_load(text)
    section = rng.choice(list(tree))
    keys = tree[section]
    path = f"{section}.{rng.choice(list(keys))}" if isinstance(keys, dict) and keys else section
    path = rng.choice((path, path, path, path[:-1], path + "." + section, section, path * 20))
    return rng.choice((f"{path}={random_value(rng)}", path, f"={path}"))


def cases(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Each a function of seed and number, so that one case can be had again."""
    texts = valid_texts(folder)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        original = text = texts[number % len(texts)]
        for _ in range(rng.randrange(0, 3)):
            text = rng.choice(
                (mutate_value, mutate_value, mutate_value, mutate_lines, mutate_text)
            )(text, rng)
        content = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            content = mutate_bytes(content, rng)
        overrides = [random_override(original, rng) for _ in range(rng.choice((0, 0, 1, 2)))]
        yield Case(content, overrides)


def check_config(config: Config, folder: Path) -> str | None:
    """What is wrong with a config that was accepted."""
    schema = type(config).model_json_schema()
    if outside(config.model_dump(mode="json"), schema, schema["$defs"]):
        return "a value outside of its limits was accepted"
    again = folder / "again.yaml"
    again.write_bytes(loading.dump_config(config).encode())
    if loading.load_config(again) != config:
        return "the config does not read back equal"
    return None


def stop_hang(number: int, frame: object) -> None:
    raise HangError


def outcome(case: Case, folder: Path) -> str:
    """accepted, refused, or the fault."""
    path = folder / "case.yaml"
    path.write_bytes(case.content)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
    try:
        config = loading.load_config(path, case.overrides)
        return check_config(config, folder) or "accepted"
    except UserError as error:
        lines = str(error).splitlines()
        is_clear = lines and all(0 < len(line) < MAX_LINE for line in lines)
        return "refused" if is_clear else f"an unclear message: {error}"
    except HangError:
        return "a hang"
    except BaseException:
        return f"a traceback: {traceback.format_exc()}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def fuzz(folder: Path, count: int, seed: int) -> tuple[Counter[str], list[tuple[Case, str]]]:
    """How many were accepted and refused, and each case with a fault."""
    counts: Counter[str] = Counter()
    faults = []
    before = signal.signal(signal.SIGALRM, stop_hang)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for case in cases(folder, count, seed):
                result = outcome(case, folder)
                if result not in ("accepted", "refused"):
                    faults.append((case, result))
                    result = "fault"
                counts[result] += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, faults = fuzz(Path(folder), arguments.cases, arguments.seed)
    for case, result in faults[:10]:
        print(case.content[:2000], [override[:200] for override in case.overrides], result, "\n")
    print(", ".join(f"{name}: {counts[name]}" for name in ("accepted", "refused", "fault")))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
