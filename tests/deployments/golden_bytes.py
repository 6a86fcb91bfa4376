"""What every message and every record of a file looks like in bytes, kept in golden_bytes.json, the newest form last.

    python -m tests.deployments.golden_bytes

adds a form where a change of the code is meant to change the bytes. The older ones stay: processes and files of before
are still read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import inspect

from deployments import contracts
from deployments.connections.ticketed_connection import Ticket
from deployments.contracts import pack
from deployments.meter.limits import reservation_journal
from deployments.meter.remote import meter_connection
from deployments.settlement import outbox
from deployments.settlement.record_file import framed

__all__ = ["KINDS", "RECORDS", "golden_forms", "newest_form", "sample_of"]

FILE: Final = Path(__file__).with_name("golden_bytes.json")
RECORDS: Final = "a file of two records"

KINDS: Final[dict[str, type[msgspec.Struct]]] = {
    f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}": kind
    for kind in (
        *(each for each in map(vars(contracts).get, contracts.__all__) if isinstance(each, type)),
        Ticket,
        meter_connection._Call,
        meter_connection._Answer,
        outbox._Entry,
        reservation_journal._Reserved,
        reservation_journal._Closed,
    )
    if issubclass(kind, msgspec.Struct)
}
"""By module and name."""


def sample_of(kind: type[msgspec.Struct]) -> msgspec.Struct:
    """A message in which every field has a value that is not its default."""
    sample: msgspec.Struct = _sample(inspect.type_info(kind), kind.__name__)
    return sample


def newest_form(name: str) -> str:
    """In hexadecimal digits."""
    return (framed([b"one", b"two"]) if name == RECORDS else pack(sample_of(KINDS[name]))).hex()


def golden_forms() -> dict[str, list[str]]:
    forms: dict[str, list[str]] = json.loads(FILE.read_text())
    return forms


def _sample(node: inspect.Type, name: str) -> Any:
    match node:
        case inspect.StructType():
            return node.cls(**{field.name: _sample(field.type, field.name) for field in node.fields})
        case inspect.UnionType():
            return next(_sample(each, name) for each in node.types if not isinstance(each, inspect.NoneType))
        case inspect.LiteralType():
            return node.values[-1]
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 300 + len(name)
        case inspect.FloatType():
            return 0.25 + len(name)
        case inspect.StrType():
            return name
        case inspect.BytesType():
            return name.encode()
        case inspect.ListType() | inspect.VarTupleType() | inspect.FrozenSetType():
            makes = {inspect.ListType: list, inspect.VarTupleType: tuple, inspect.FrozenSetType: frozenset}[type(node)]
            return makes([_sample(node.item_type, name)])
        case inspect.TupleType():
            return tuple(_sample(each, name) for each in node.item_types)
        case inspect.DictType():
            return {_sample(node.key_type, name): _sample(node.value_type, name)}
        case inspect.RawType():
            return msgspec.Raw(msgspec.msgpack.encode(name))
        case inspect.AnyType():
            return [name]
    raise TypeError(f"{name}: {node}")


def main() -> None:
    forms = golden_forms() if FILE.exists() else {}
    for name in [*KINDS, RECORDS]:
        known = forms.setdefault(name, [])
        if (form := newest_form(name)) not in known[-1:]:
            known.append(form)
            print(f"{name}: form {len(known)}")
    FILE.write_text(json.dumps(forms, indent=1) + "\n")


if __name__ == "__main__":
    main()
