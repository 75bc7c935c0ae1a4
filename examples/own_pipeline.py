"""A pipeline of one's own: sync, async and streaming functions, each call a row.

Run it with OTEL_ASTROCYTE_AUDIT_DSN set to a database in which it may create the table.
"""

import asyncio
from collections.abc import AsyncIterator

from astrocyte_otel_audit import audit_scope, audited, configure_audit


@audited("retain")
def retain(content: str, bank_id: str, tags: list[str]) -> dict[str, object]:
    return {"stored": True, "memory_id": "m-42"}


@audited("recall", response=lambda hits: {"hits": hits})
async def recall(query: str, bank_id: str, top_k: int = 10) -> list[dict[str, object]]:
    await asyncio.sleep(0)
    return [{"id": "m-42", "text": "Calvin prefers dark mode", "score": 0.93}]


@audited("reflect", request=["bank_id"])
async def reflect(query: str, bank_id: str) -> AsyncIterator[str]:
    for token in ("dark", " ", "mode"):
        yield token


@audited("forget", required=True)  # without an audit pipeline the body does not run
def forget(memory_id: str, bank_id: str) -> int:
    raise PermissionError("Calvin's memories are on legal hold")  # the row has the class, never the message


async def main() -> None:
    with audit_scope(actor_id="calvin", actor_type="user", transport="http"):
        retain("Calvin prefers dark mode", "user-calvin", tags=["ui"])
        await recall("What does Calvin like?", "user-calvin")
        async for _ in reflect("What does Calvin like?", "user-calvin"):
            pass
        try:
            forget("m-42", "user-calvin")
        except PermissionError:
            print("not forgotten")


if __name__ == "__main__":
    processor = configure_audit(actions=["re*", "forget"], migrate=True)
    asyncio.run(main())
    print("all written:", processor.force_flush())
