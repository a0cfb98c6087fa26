"""Reads what Weights & Biases keeps of a run that was offline."""

import json
import struct
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

# its file is a log of LevelDB's: a header, then records in blocks of this size
HEADER, BLOCK = 7, 32768
WHOLE, LAST = 1, 4


def read_run(folder: Path):
    """(id, project, config, lines of metrics) of the only run below a folder."""
    # its service writes the last lines after the run has ended
    wandb.teardown()
    (path,) = folder.rglob("run-*.wandb")
    data, at, text, records = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        text += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            records.append(Record.FromString(text))
            text = b""
    (run,) = [each.run for each in records if each.WhichOneof("record_type") == "run"]
    config = {each.key: json.loads(each.value_json) for each in run.config.update}
    lines = [
        {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in each.history.item}
        for each in records
        if each.WhichOneof("record_type") == "history"
    ]
    return run.run_id, run.project, config, lines
