"""A thousand seeded mutations of the golden and hostile files: a report or one sentence, and soon."""

import random
import time

import pytest
from google.protobuf.descriptor import FieldDescriptor
from onnx import ModelProto

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.prove import verify_checkpoint, verify_onnx
from tests import ROOT

FILES = sorted(
    path
    for folder in ("tests/golden/verify", "tests/hostile")
    for path in (ROOT / folder).iterdir()
    if path.suffix in (".onnx", ".safetensors")
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    63,
    64,
    65,
    255,
    1 << 20,
    1 << 31,
    -(1 << 31),
    (1 << 63) - 1,
    -(1 << 63),
)
TEXTS = ("", "w", "x", "good", "\0", "../w.bin", "com.microsoft", "MatMul", "Loop", "é" * 300)


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, insert, or repeat a stretch."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        # the structure is at the front and between the values, not in them
        at = rng.randrange(min(len(changed), rng.choice((64, 512, len(changed)))) or 1)
        kind = rng.randrange(5)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            changed[at : at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if changed else b""
        elif kind == 2:
            del changed[at : at + rng.choice((1, 4, 100))]
        elif kind == 3:
            changed[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
        else:
            changed[at:at] = changed[at : at + rng.choice((8, 64))]
    return bytes(changed[: rng.randrange(len(changed) + 1)] if not rng.randrange(8) else changed)


def messages(message, found):
    """Every message in a message."""
    found.append(message)
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                messages(inner, found)
    return found


def fields_changed(data: bytes, rng: random.Random) -> bytes:
    """Change fields of a model, and keep it a message."""
    model = ModelProto.FromString(data)
    for _ in range(rng.randint(1, 4)):
        message = rng.choice(messages(model, []))
        field = rng.choice(message.DESCRIPTOR.fields)
        if not rng.randrange(4):
            message.ClearField(field.name)
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            same = [m for m in messages(model, []) if m.DESCRIPTOR is field.message_type]
            target = getattr(message, field.name)
            if same and message.ByteSize() < 1 << 20:
                copy = type(same[0])()
                copy.CopyFrom(rng.choice(same))
                target.append(copy) if field.is_repeated else target.CopyFrom(copy)
            continue
        given = {
            FieldDescriptor.CPPTYPE_STRING: lambda: rng.choice(TEXTS),
            FieldDescriptor.CPPTYPE_FLOAT: lambda: rng.choice((0.0, 1.5, float("nan"))),
            FieldDescriptor.CPPTYPE_DOUBLE: lambda: rng.choice((0.0, 1.5, float("nan"))),
        }.get(field.cpp_type, lambda: rng.choice(NUMBERS))()
        if field.type == FieldDescriptor.TYPE_BYTES:
            given = given.encode()
        try:
            target = getattr(message, field.name)
            if field.is_repeated and len(target) and rng.randrange(2):
                target[rng.randrange(len(target))] = given
            elif field.is_repeated:
                target.append(given)
            else:
                setattr(message, field.name, given)
        except ValueError:  # a number that the field does not hold
            continue
    return model.SerializeToString()


def mutated(path, seed):
    rng = random.Random(seed)
    data = path.read_bytes()
    if path.suffix == ".onnx" and seed % 3:
        return fields_changed(data, rng)
    return bytes_changed(data, rng)


def judged(path, folder, seed):
    """Verify one mutation; return what it said and how long that took."""
    target = folder / f"mutated{path.suffix}"
    target.write_bytes(mutated(path, seed))
    check = verify_onnx if path.suffix == ".onnx" else verify_checkpoint
    start = time.perf_counter()
    try:
        report = check(target, expect=["w"] if seed % 5 == 0 else [])
        said = report.strict().summary()
        report.to_json()
    except NmsparseError as error:
        said = error.message
    return said, time.perf_counter() - start


@pytest.mark.matrix
def test_no_mutation_ends_in_a_traceback_or_takes_long(tmp_path):
    for seed in range(1000):
        said, seconds = judged(FILES[seed % len(FILES)], tmp_path, seed)
        assert said and "\n" not in said, (seed, said)
        assert seconds < 5, (seed, FILES[seed % len(FILES)].name, seconds)


def test_the_first_mutations_are_told(tmp_path):
    for seed in range(3 * len(FILES)):
        said, _ = judged(FILES[seed % len(FILES)], tmp_path, seed)
        assert said and "\n" not in said, (seed, said)
