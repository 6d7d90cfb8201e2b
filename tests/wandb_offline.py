"""Reads what wandb wrote in its folder while offline: a run's config, summary, history, and its messages."""

import json
import struct
from pathlib import Path


def messages(path, block=32768):
    """The records of a .wandb file: 32 KiB blocks of chunks, each with checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0 or position + 7 + length > len(data):
            break
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            message = Message()
            message.ParseFromString(b"".join(parts))
            yield message
            parts = []


def read_back(run_folder):
    """Config, summary and history of an offline run, with the run's own message."""
    (path,) = Path(run_folder).glob("run-*.wandb")
    config, summary, history, run = {}, {}, {}, None
    for message in messages(path):
        if message.HasField("run"):
            run = message.run
        for items, into in (
            (message.run.config.update, config),
            (message.config.update, config),
            (message.summary.update, summary),
            (message.history.item, history),
        ):
            for item in items:
                *outer, last = item.nested_key or [item.key]
                place = into
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
    return config, summary, history, run
